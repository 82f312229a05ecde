"""Jobs of ranks that write checkpoints of real engines, whole ones and ones that fail.

The test process itself does not import this: it would load Megatron-core.
"""

import errno
import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

from dash_dist.config.file import load_config
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import CheckpointError
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.write_plan import WritePlan
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager
from tests.support.attempts import attempt


def runs_to_damage(config: Path) -> None:
    """Write checkpoints of steps 2 and 4 of two runs, `whole` and `other`, which has another model."""
    for name, overrides in {"whole": [], "other": ["model.num_layers=4"]}.items():
        outcome = attempt(
            config, f"run.name={name}", "parallel.context=1", "training.steps=4", "checkpoint.interval=2", *overrides
        )
        assert outcome.summary is not None, outcome.error


def dies_while_it_saves(config: Path, folder: Path) -> None:
    """Train until killed while the second checkpoint is half written."""
    half_written = folder / "half_written"
    write = WritePlan.write

    def write_half(plan):
        if not (folder / "first_is_written").exists():
            written = write(plan)
            (folder / "first_is_written").touch()
            return written
        with open(plan.path, "wb") as file:
            file.write(b"half of a file")
        half_written.write_text(str(os.getpid()))
        time.sleep(1000)

    train_step = MegatronEngine.train_step

    def train_step_until_then(engine, micro_batches):
        if half_written.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(engine, micro_batches)

    with (
        mock.patch.object(WritePlan, "write", write_half),
        mock.patch.object(MegatronEngine, "train_step", train_step_until_then),
    ):
        attempt(config, "run.name=killed", "parallel.context=1", "training.steps=100000", "checkpoint.interval=2")


def saves_that_fail(folder: Path) -> list[str]:
    """Return the errors of saves at one rank, in the background and not.

    Rank 1 alone cannot write its file; then rank 0 alone cannot write the index; then a save succeeds ("").
    """
    config = load_config(folder / "tiny.yaml", ["parallel.context=2"])
    dims = ParallelDims.initialise(config.parallel, timeout=config.training.distributed_timeout)
    told = []
    try:
        engine = MegatronEngine(
            config.model,
            config.attention,
            config.parallel,
            config.optimizer,
            dims=dims,
            vocab_size=257,
            sequence_length=256,
            total_steps=10,
        )
        control = ControlGroup(timedelta(seconds=60))
        for step, asynchronous in enumerate((True, False), start=1):
            manager = CheckpointManager(folder / "runs" / "failing", control, keep=9, asynchronous=asynchronous)

            def save(manager=manager, step=step) -> str:
                try:
                    manager.start(RunState(step), engine, {})
                    manager.finish()
                except CheckpointError as error:
                    return str(error)
                return ""

            limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            if dims.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard_limit))
            told.append(save())
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard_limit))
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), ".metadata")
            with mock.patch.object(WritePlan, "write_index", side_effect=full):
                told.append(save())
            told.append(save())
    finally:
        dims.close()
    return told
