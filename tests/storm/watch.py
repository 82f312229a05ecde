"""Observation of a run under the storm from outside: its ranks, steps, losses, events and checkpoints.

Knows the files that the ranks' hook and the run write; does not know faults.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dash_dist.run.events import Event, EventLog
from tests.storm.errors import StormError
from tests.storm.processes import alive
from tests.storm.requests import RankRequests


@dataclass(frozen=True)
class RankStep:
    """One step of one rank. `time` is its end, in seconds since 1970."""

    pid: int
    rank: int
    world_size: int
    step: int
    loss: float
    skipped: bool
    time: float


class RunWatch:
    """Observer of a run.

    Args:
        ranks: output folder of the ranks' hook.
        run_directory: folder of the run.
    """

    def __init__(self, ranks: Path, run_directory: Path) -> None:
        self.run_directory = run_directory
        self.requests = RankRequests(ranks)
        self._ranks = ranks
        self._offsets: dict[Path, int] = {}
        self.steps: list[RankStep] = []
        """Steps recorded until the last `refresh`, in order for each process."""

    def refresh(self) -> None:
        """Read the steps recorded since the last call."""
        for path in sorted(self._ranks.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offsets[path] = self._offsets.get(path, 0) + len(line)
                    self.steps.append(RankStep(pid=int(path.stem), **json.loads(line)))

    @property
    def latest(self) -> RankStep | None:
        """The step that was recorded last."""
        self.refresh()
        return max(self.steps, key=lambda one: one.time, default=None)

    @property
    def step(self) -> int:
        """Number of the step that was recorded last; 0 before the first."""
        latest = self.latest
        return latest.step if latest else 0

    def ranks(self) -> dict[int, psutil.Process]:
        """Return rank -> process, for living ranks that have done a step."""
        self.refresh()
        found: dict[int, psutil.Process] = {}
        for record in sorted(self.steps, key=lambda one: one.time):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(record.pid)
                if alive(process) and process.create_time() <= record.time:
                    found[record.rank] = process
        latest = self.latest
        return {rank: process for rank, process in found.items() if latest and rank < latest.world_size}

    def steps_since(self, moment: float, *, not_of: frozenset[int] = frozenset()) -> list[RankStep]:
        """Return the steps recorded after `moment` by processes other than `not_of`, oldest first."""
        self.refresh()
        found = [one for one in self.steps if one.time > moment and one.pid not in not_of]
        return sorted(found, key=lambda one: one.time)

    def losses(self) -> dict[int, float]:
        """Return step -> loss of rank 0, from the last time it did the step."""
        self.refresh()
        of_main = sorted((one for one in self.steps if one.rank == 0), key=lambda one: one.time)
        return dict(sorted({one.step: one.loss for one in of_main}.items()))

    def events(self) -> list[Event]:
        return EventLog(self.run_directory).read()

    def drawn_events(self) -> dict[str, int]:
        """Return kind -> number of events that TensorBoard shows at its last step."""
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every step that a restart undid
        curves = EventAccumulator(str(self.run_directory / "tensorboard"), size_guidance={"scalars": 0})
        curves.Reload()
        tags = [tag for tag in curves.Tags()["scalars"] if tag.startswith("fault/")]
        return {tag.removeprefix("fault/"): int(curves.Scalars(tag)[-1].value) for tag in tags}

    def wait_until_ended(self, *, seconds: float) -> None:
        """Wait until no rank of any attempt is left. Raises StormError."""
        deadline = time.monotonic() + seconds
        while left := self.ranks():
            if time.monotonic() > deadline:
                raise StormError(f"the run is over, and ranks are left: {left}")
            time.sleep(0.1)

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted((self.run_directory / "checkpoints").glob("step_*"))

    def saved_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return [saved_step(folder) for folder in self.checkpoints()]

    def stacks(self) -> str:
        """Return the stacks of all living ranks."""
        ranks = self.ranks()
        for process in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR2)
        time.sleep(1.0)
        files = {rank: self._ranks / f"{process.pid}.stacks" for rank, process in ranks.items()}
        return "\n".join(f"rank {rank}:\n{path.read_text(errors='replace')}" for rank, path in sorted(files.items()))


def saved_step(checkpoint: Path) -> int:
    """Return the step of a complete checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))
