"""torchrun for the processes of one machine, for launch/torchrun.sh: nothing listens beyond loopback.

    python launch/local_torchrun.py --nproc-per-node N -m MODULE [ARGUMENT ...]

`torchrun --standalone` meets through a TCP store that listens on every interface. Here the launcher meets itself in a
file, and its processes meet on loopback, at a port that the first one takes and tells in the same folder.

Environment: DASH_DIST_FAILED_RANK, a file that receives the rank that failed first and its signal or exit status.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def report(error: ChildFailedError) -> None:
    if path := os.environ.get("DASH_DIST_FAILED_RANK"):
        rank, failure = error.get_first_failure()  # the others are ended by torchrun
        code = failure.exitcode
        end = f"with status {code}" if code >= 0 else f"by {failure.signal_name()}"
        with contextlib.suppress(OSError):
            Path(path).write_text(f"rank {rank} ended {end}")


if __name__ == "__main__":
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="dash-dist-") as folder:
        os.environ["DASH_DIST_MEETING"] = folder
        # A file grows by every sign of life.
        conf = "store_type=file,keep_alive_interval=60"
        meeting = ["--rdzv-backend", "c10d", "--rdzv-conf", conf, "--rdzv-endpoint", f"{folder}/store"]
        try:
            main([*meeting, "--local-addr", "127.0.0.1", *sys.argv[1:]])
        except ChildFailedError as error:
            report(error)
            raise
