"""Supervision of one run on Ray: attempts on as many workers as the cluster can hold, until the run is complete.

Knows why attempts end and what follows; does not know Ray (`Cluster` does) nor what a training step is.

An attempt ends in one of four ways: the run is complete or was told to stop; a permanent RunError; lost workers; a
command to save and start again on more workers. After the last two the run resumes from its newest checkpoint. The
global batch stays the same for every number of workers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from dash_dist.cluster.capacity import usable_workers
from dash_dist.cluster.failures import FailureLog
from dash_dist.cluster.group import AttemptFailed, NodeLost
from dash_dist.cluster.limits import Limits
from dash_dist.cluster.rank import Job, ProgressMessage, RankResult
from dash_dist.cluster.retries import Retries
from dash_dist.config.run import RunConfig
from dash_dist.errors import RunError
from dash_dist.run.messages import ProgressReporter, RunSummary
from dash_dist.run.requests import Command, Request

# Seconds between two looks at the run's messages, and at the cluster.
_POLL_SECONDS = 0.2
_CLUSTER_POLL_SECONDS = 2.0

# Nodes come back one by one: the room for more workers must have been constant for this many seconds.
_STEADY_SECONDS = 15.0


class Group(Protocol):
    """The workers of an attempt, as WorkerGroup has them."""

    @property
    def size(self) -> int: ...

    @property
    def node_ids(self) -> Sequence[str]: ...

    @property
    def ended(self) -> bool: ...

    def start(self, job: Job) -> None: ...

    def poll(self, command: Command) -> list[ProgressMessage]: ...

    def results(self) -> tuple[list[RankResult], list[ProgressMessage]]: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class View:
    """State of a cluster as a run sees it.

    Attributes:
        room: workers that fit on nodes that stay, those of the run included.
        notice: text that names the run's nodes about to be taken away, constant while it holds; "" for none.
    """

    room: int
    notice: str = ""


class Cluster(Protocol):
    """Where workers are placed."""

    def look(self, held: Sequence[str] = ()) -> View:
        """Return the current view; `held` are the node ids of the current workers, one for each."""

    def place(self, num_workers: int, keep_waiting: Callable[[], None]) -> Group:
        """Start worker processes that wait for their job. Raises AttemptFailed and the errors of `keep_waiting`."""

    def ask_for(self, workers: int) -> None:
        """Tell an autoscaler, if there is one, how many workers the run could use."""


class Clock(Protocol):
    """The part of the module `time` that is needed."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class Stopped(Exception):
    """Raised after a request to stop while no worker is running."""


class Supervisor:
    """Attempts of one run.

    Args:
        config: of the run.
        directory: base of the relative paths in `config`.
        limits: of workers, failures and waiting.
        cluster: where workers are placed.
        console: receives the run's progress.
        stop_requested: returns True once the driver was told to end the run, which then saves and ends.
        clock: `time`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        directory: Path,
        limits: Limits,
        cluster: Cluster,
        console: ProgressReporter,
        stop_requested: Callable[[], bool],
        clock: Clock = time,
    ) -> None:
        self._config = config
        self._limits = limits
        self._cluster = cluster
        self._console = console
        self._stop_requested = stop_requested
        self._clock = clock
        self._log = FailureLog(directory / config.run.path, console.note)
        saved_step = self._log.saved_step()
        if config.run.resume == "never" and not saved_step:
            # What is there later is this run's own: an attempt after the first must go on from it.
            config = config.going_on()
        self._job = Job(config=config, directory=str(directory), join_seconds=limits.start_timeout_seconds)
        self._asked_for_nodes = False
        self._fewest = limits.min_workers or config.model_ranks
        self._retries = Retries(limits.max_failures, saved_step=saved_step)
        self._trained = False

    def run(self) -> RunSummary | None:
        """Bring the run to its end. Returns its summary, None for a run stopped before any worker ran.

        Raises RunError for a permanent error, and after too many failures in a row.
        """
        previous = 0
        # The first attempt waits for all it may have, a later one for what its predecessor had.
        wanted = self._limits.num_workers or 0
        try:
            while True:
                workers = self._wait_for_room(wanted)
                if previous not in (0, workers):
                    resized = f"{workers} workers instead of {previous}, with the same global batch"
                    self._console.note(resized)
                    self._log.record("resized", resized)
                previous = wanted = workers
                self._log.begin()
                try:
                    summary = self._attempt(workers)
                except NodeLost as loss:  # nothing has run: no failure of the run
                    self._console.note(str(loss))
                except AttemptFailed as failure:
                    pause = self._pause_after(failure)
                    self._log.restart(str(failure))
                    self._wait(pause)
                else:
                    if summary is not None:
                        return summary
                    wanted = 0  # it ended so as to grow: whatever has room now is more
        except Stopped:
            self._console.note(
                f"stopped while no worker was running; the newest checkpoint is of step {self._log.saved_step()}"
            )
            return None
        finally:
            if self._asked_for_nodes:
                self._cluster.ask_for(0)

    def _wait_for_room(self, wanted: int) -> int:
        """Return the number of workers for the next attempt; waits for nodes while fewer than `wanted` have room."""
        wanted = max(wanted, self._fewest)
        patience = self._limits.node_wait_seconds
        begun = self._clock.monotonic()
        noted = False
        while (workers := self._usable(self._cluster.look().room)) < wanted:
            if self._clock.monotonic() - begun >= patience:
                if workers >= self._fewest:
                    break
                room = self._cluster.look().room
                pause = self._pause_after(
                    AttemptFailed(
                        f"the cluster has room for {room} workers and the run needs at least {self._fewest}; "
                        f"waited {patience:.0f} s for more (--node-wait-seconds)"
                    )
                )
                self._wait(pause)
                begun = self._clock.monotonic()
            if not noted:
                noted = True
                self._console.note(f"room for {workers} of {wanted} workers: waiting up to {patience:.0f} s for nodes")
                self._asked_for_nodes = True
                self._cluster.ask_for(self._limits.num_workers or wanted)
            self._wait(1.0)
        return workers

    def _usable(self, room: int) -> int:
        most = self._limits.num_workers
        return usable_workers(self._config, room if most is None else min(room, most))

    def _attempt(self, workers: int) -> RunSummary | None:
        """Run one attempt. Returns the run's summary, None to start again on more workers.

        Raises AttemptFailed and RunError.
        """
        self._trained = False
        group = self._cluster.place(workers, self._check_stop)
        try:
            group.start(self._job)
            growing = self._watch(group)
            ended, messages = group.results()
            self._show(messages)
        finally:
            group.end()
        refusal = next((one.refusal for one in ended if one.refusal is not None), None)
        if refusal is not None:
            raise refusal
        summary = next(one.summary for one in ended if one.summary is not None)
        if growing and not summary.completed:
            return None
        self._console.finish(summary)
        return summary

    def _watch(self, group: Group) -> bool:
        """Follow an attempt until a rank ends by itself; returns True if it was told to, so as to start larger."""
        growth = _Growth(group.size, self._clock.monotonic(), self._limits.grow_interval_seconds)
        command = Command()
        growing = stopping = False
        looked_at = float("-inf")
        while not group.ended:
            self._show(group.poll(command))
            now = self._clock.monotonic()
            if self._stop_requested() and not stopping:
                stopping, growing = True, False
                command = Command(Request.STOP)
                self._console.note("asked to stop: the run finishes its step and saves; once more ends it at once")
            if not stopping and not growing and now - looked_at > _CLUSTER_POLL_SECONDS:
                looked_at = now
                view = self._cluster.look(group.node_ids)
                if view.notice and view.notice != command.reason:
                    command = Command(Request.SAVE, view.notice)
                    self._console.note(f"{view.notice}: the run saves, and continues until then")
                fitting = self._usable(view.room)
                if growth.due(fitting, now) and not view.notice:
                    growing = True
                    command = Command(Request.STOP)
                    self._console.note(f"room for {fitting} workers: the run saves, and restarts with them")
            self._clock.sleep(_POLL_SECONDS)
        return growing

    def _pause_after(self, failure: AttemptFailed) -> float:
        """Seconds to wait before the next attempt. Raises RunError, and records it, if there is to be none."""
        step = self._log.saved_step()
        pause = self._retries.pause_after_failure(step, trained=self._trained)
        where = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint yet"
        if self._stop_requested():
            self._give_up(f"asked to stop, the run failed before it had saved: {failure}\n{where}")
        if pause is None:
            times = (
                f" {self._retries.in_a_row} times in a row without a new checkpoint"
                if self._retries.in_a_row > 1
                else ""
            )
            self._give_up(
                f"the run failed{times}, and is not started again (--max-failures {self._limits.max_failures}): "
                f"{failure}\n"
                f"{where}; the same command continues from there"
            )
        self._console.note(f"{failure}\n{where}: starting again in {pause:.0f} s")
        return pause

    def _give_up(self, reason: str) -> NoReturn:
        self._log.record("failed", reason)
        raise RunError(reason)

    def _wait(self, seconds: float) -> None:
        until = self._clock.monotonic() + seconds
        while (left := until - self._clock.monotonic()) > 0:
            self._check_stop()
            self._clock.sleep(min(left, _POLL_SECONDS))

    def _check_stop(self) -> None:
        if self._stop_requested():
            raise Stopped

    def _show(self, messages: Sequence[ProgressMessage]) -> None:
        for kind, content in messages:
            # Checkpoints that came without this are not of this attempt: another run is at work in the folder.
            self._trained |= kind == "start"
            if kind != "finish":  # shown when no further attempt follows
                getattr(self._console, kind)(content)


class _Growth:
    """Decision to replace an attempt of `size` workers, begun at `begun`, by a larger one."""

    def __init__(self, size: int, begun: float, interval: float) -> None:
        self._size = size
        self._earliest = begun + interval
        self._fitting = size
        self._since = begun

    def due(self, fitting: int, now: float) -> bool:
        """Return whether to grow, now that `fitting` workers have room."""
        if fitting != self._fitting:
            self._fitting, self._since = fitting, now
        return fitting > self._size and now >= self._earliest and now - self._since >= _STEADY_SECONDS
