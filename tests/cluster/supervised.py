"""A supervisor with a cluster, a clock and workers that only say what they are told to."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dash_dist.cluster.group import AttemptFailed, NodeLost
from dash_dist.cluster.limits import Limits
from dash_dist.cluster.rank import Job, ProgressMessage, RankResult
from dash_dist.cluster.supervisor import Supervisor, View
from dash_dist.config.file import load_config
from dash_dist.errors import RunError
from dash_dist.run.attempts import AttemptRecord, last_attempt
from dash_dist.run.events import Event, EventLog
from dash_dist.run.messages import RunStart, RunSummary
from dash_dist.run.requests import Command, Request
from tests.support.runs import write_config

DEATH = "rank 1 died"


class Clock:
    """Time passes by sleeping only; `events` happen at their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()


class Console:
    """Keeps what a person would have read."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.finished: RunSummary | None = None

    def start(self, run: RunStart) -> None:
        self.notes.append(run.name)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, summary: RunSummary) -> None:
        self.finished = summary


class Workers:
    """A group that runs for `seconds`, unless asked to stop, then saves `step` and ends as `outcome` says.

    "shut out": another run saves `step` meanwhile, and this one dies before it trains.
    """

    def __init__(self, cluster: "FakeCluster", size: int, step: int, outcome: str, seconds: float) -> None:
        self.size = size
        self.node_ids = ["a"] * size
        self.asked = Command()
        self._cluster, self._step, self._outcome = cluster, step, outcome
        self._until = cluster.clock.now + seconds
        self._started = False

    @property
    def ended(self) -> bool:
        return self._outcome not in ("die", "shut out") and self._over

    @property
    def _over(self) -> bool:
        return self.asked.request is Request.STOP or self._cluster.clock.now >= self._until

    def start(self, job: Job) -> None:
        self._cluster.running.append(self)
        self._cluster.jobs.append(job)
        if self._outcome != "shut out":
            begin_attempt(self._cluster.run_directory, self.size)

    def poll(self, asked: Command) -> list[ProgressMessage]:
        self.asked = asked
        self._cluster.asked.append(asked)
        if self._over:
            self._save()
        if self._over and self._outcome in ("die", "shut out"):
            raise AttemptFailed(self._cluster.cause)
        if self._outcome == "shut out" or self._started:
            return []
        self._started = True
        return [("start", RunStart("tiny", "2 x cpu", 0, 20, 512, None))]

    def results(self) -> tuple[list[RankResult], list[ProgressMessage]]:
        self._save()
        if self._outcome == "refuse":
            return [RankResult(refusal=RunError("lower optimizer.lr"))] * self.size, []
        completed = self._cluster.clock.now >= self._until
        run = self._cluster.run_directory
        summary = RunSummary(self._step, completed, 5.0, 4.0, 0, 1.0, run / "tensorboard", run / "checkpoints")
        return [RankResult(summary=summary)] * self.size, []

    def end(self) -> None:
        self._cluster.running.remove(self)

    def _save(self) -> None:
        if self._step:
            save(self._cluster.run_directory, self._step)


def begin_attempt(run_directory: Path, size: int) -> None:
    """What rank 0 writes at the beginning of an attempt."""
    run_directory.mkdir(parents=True, exist_ok=True)
    last = last_attempt(run_directory)
    AttemptRecord(last.attempt + 1 if last else 1, 0.0, "a", 1, size, 0).write(run_directory)


def save(run_directory: Path, step: int) -> None:
    """What a complete checkpoint looks like from outside."""
    (run_directory / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)


class FakeCluster:
    """`attempts` are (step saved, how it ends, seconds) of one group after the other."""

    def __init__(
        self, clock: Clock, run_directory: Path, room: int, attempts: Sequence[tuple[int, str, float]]
    ) -> None:
        self.clock = clock
        self.run_directory = run_directory
        self.room = room
        self.notice = ""
        self.cause = DEATH
        self.lost_while_placing = 0
        self.attempts = list(attempts)
        self.sizes: list[int] = []
        self.started_at: list[float] = []
        self.asked: list[Command] = []
        self.jobs: list[Job] = []
        self.running: list[Workers] = []
        self.asked_for: list[int] = []

    def look(self, held: Sequence[str] = ()) -> View:
        return View(self.room, self.notice if held else "")

    def place(self, num_workers: int, keep_waiting: Callable[[], None]) -> Workers:
        assert not self.running, "two attempts at once"
        keep_waiting()
        if self.lost_while_placing:
            self.lost_while_placing -= 1
            raise NodeLost("a node was lost")
        self.sizes.append(num_workers)
        self.started_at.append(self.clock.now)
        return Workers(self, num_workers, *self.attempts.pop(0))

    def ask_for(self, workers: int) -> None:
        self.asked_for.append(workers)


class Case:
    """A supervisor over a FakeCluster."""

    def __init__(
        self,
        folder: Path,
        room: int,
        attempts: Sequence[tuple[int, str, float]],
        *,
        resume: str = "auto",
        saved: int = 0,
        **limits: float,
    ) -> None:
        config = load_config(write_config(folder), ["training.global_batch_size=8", f"run.resume={resume}"])
        if saved:
            save(config.run.path, saved)
        self.clock, self.console, self.stop = Clock(), Console(), False
        self.cluster = FakeCluster(self.clock, config.run.path, room, attempts)
        self.supervisor = Supervisor(
            config,
            directory=folder,
            limits=Limits(**{"num_workers": 8, **limits}),
            cluster=self.cluster,
            console=self.console,
            stop_requested=lambda: self.stop,
            clock=self.clock,
        )

    def events(self, kind: str = "resized") -> list[str]:
        return [event.message for event in self.log() if event.kind == kind]

    def log(self) -> list[Event]:
        return EventLog(self.cluster.run_directory).read()

    def at(self, seconds: float, name: str, value: object, of_cluster: bool = True) -> None:
        self.clock.events.append((seconds, lambda: setattr(self.cluster if of_cluster else self, name, value)))
