"""Programs that a benchmark starts: what it says of one that failed."""

import pytest

from tools.benchmarks.common.launch import run_python

FAILING = """
import sys
{reason}
sys.stderr.write('''Traceback (most recent call last):
  File "torch/distributed/run.py", line 1, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
dash_dist.cli FAILED
''')
sys.exit(1)
"""


@pytest.mark.parametrize("reason", ["print('error: too large', file=sys.stderr)", "print('error: too large')"])
def test_the_reason_is_that_of_the_rank_and_not_the_launcher(reason: str) -> None:
    with pytest.raises(RuntimeError, match=r"^exit status 1: error: too large\n?$"):
        run_python(["-c", FAILING.format(reason=reason)], seconds=60)


def test_a_traceback_of_the_program_itself_is_the_reason() -> None:
    with pytest.raises(RuntimeError, match="ValueError: too large"):
        run_python(["-c", "raise ValueError('too large')"], seconds=60)
