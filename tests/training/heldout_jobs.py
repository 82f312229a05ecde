"""Jobs of the tests of runs with a held-out loss.

The test process itself does not import this: it would load Megatron-core.
"""

from pathlib import Path
from unittest import mock

import torch.distributed as dist

from dash_dist.training.heldout import HeldOut
from tests.support.attempts import Outcome, attempt


def runs(config: Path, evaluation: list[str]) -> dict[str, Outcome]:
    def run(name: str, *overrides: str) -> Outcome:
        return attempt(config, f"run.name={name}", "training.steps=5", *overrides)

    outcomes = {
        "without": run("without"),
        "with": run("with", *evaluation),
        "dp": run("dp", *evaluation, "parallel.context=1"),
        "separate": run("separate", *evaluation, "evaluation.data.documents=separate"),
    }

    def broken(heldout: HeldOut) -> None:
        if dist.get_rank() == 1:
            raise OSError(5, "Input/output error", "/held/out")

    real = HeldOut._stream
    calls = 0

    def later_broken(heldout: HeldOut):
        nonlocal calls
        calls += 1
        return broken(heldout) or real(heldout) if calls > 2 else real(heldout)

    with mock.patch.object(HeldOut, "_stream", later_broken):
        outcomes["unreadable"] = run("unreadable", *evaluation)
    return outcomes
