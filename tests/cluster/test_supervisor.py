"""What the supervisor does next: a cluster, a clock and workers that only say what they are told to."""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dash_dist.cluster import ray_cluster
from dash_dist.cluster.capacity import check_local_gpus, default_num_workers, usable_workers
from dash_dist.cluster.group import AttemptFailed, NodeLost, rank_envs, rank_order
from dash_dist.cluster.limits import Limits
from dash_dist.cluster.nodes import CPU_WORKER, GPU_WORKER, Node, preemption_notice, room_for_workers
from dash_dist.cluster.processes import ProcessId
from dash_dist.cluster.rank import Job, Place, ProgressMessage, RankResult
from dash_dist.cluster.retries import Retries
from dash_dist.cluster.supervisor import Supervisor, View
from dash_dist.config.file import load_config
from dash_dist.errors import ConfigError, RunError
from dash_dist.run.attempts import AttemptRecord, last_attempt
from dash_dist.run.events import Event, EventLog
from dash_dist.run.messages import RunStart, RunSummary
from dash_dist.run.requests import Command, Request
from dash_dist.training.faults.watchdog import hang_folder
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


def test_a_run_that_loses_a_worker_is_started_again_on_all(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    summary = case.supervisor.run()
    assert summary is not None
    assert summary.completed
    assert case.console.finished is summary
    assert case.cluster.sizes == [8, 8]
    assert case.events() == []
    assert any(DEATH in note and "newest checkpoint is of step 4" in note for note in case.console.notes)


@pytest.mark.parametrize(
    "cause",
    [
        "rank 3 (process 812 on 10.0.0.7) died: Worker unexpectedly exits, signal SIGKILL",
        "rank 2 (process 811 on 10.0.0.7) died: The actor died because its node has died.",
        "rank 1 (process 810 on 10.0.0.6) has not answered for 120 s: the process is stopped",
        "rank 0 (process 809 on 10.0.0.6) failed: RunError: cannot read the data: Stale file handle: part-0.parquet",
    ],
)
def test_one_line_of_the_event_log_says_why_a_run_was_started_again(tmp_path, cause):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    case.cluster.cause = cause
    case.supervisor.run()
    (event,) = case.log()
    assert (event.kind, event.step, event.attempt) == ("restart", 4, 1)
    assert event.message == f"attempt 1 (8 processes) was lost: {cause}"


def test_the_line_names_the_stacks_of_a_hang(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    stacks = hang_folder(case.cluster.run_directory, 1)
    stacks.mkdir(parents=True)
    (stacks / "rank_00003.txt").write_text("File ...")
    case.supervisor.run()
    (event,) = case.log()
    assert event.message.startswith(f"attempt 1 (8 processes) was lost: {DEATH}; no progress; 1 of the ranks")
    assert str(stacks) in event.message


def test_a_start_that_fails_is_a_restart_of_no_attempt(tmp_path):
    case = Case(tmp_path, 8, [(0, "shut out", 10), (12, "done", 10)])
    begin_attempt(case.cluster.run_directory, 8)  # of another command, which died
    case.supervisor.run()
    (event,) = case.log()
    assert (event.kind, event.attempt) == ("restart", None)
    assert event.message == f"the start of an attempt failed: {DEATH}"


def test_a_full_disk_costs_the_event_and_nothing_else(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    monkeypatch.setattr(EventLog, "append", refuse)
    assert case.supervisor.run() is not None
    assert any("the event could not be written" in note for note in case.console.notes)


def test_lost_nodes_are_waited_for_and_then_done_without(tmp_path):
    """6 places are left: 4 workers is the most of them that the run can use. The wait ends by itself."""
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)], node_wait_seconds=30)
    case.at(9, "room", 6)
    case.supervisor.run()
    assert case.cluster.sizes == [8, 4]
    assert 40 < case.cluster.started_at[1] < 45
    assert case.events() == ["4 workers instead of 8, with the same global batch"]
    assert case.cluster.asked_for == [8, 0]  # an autoscaler is told, and told when it is over


def test_a_node_that_comes_back_in_time_is_used_at_once(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)], node_wait_seconds=30)
    case.at(9, "room", 4)
    case.at(20, "room", 8)
    case.supervisor.run()
    assert case.cluster.sizes == [8, 8]
    assert case.cluster.started_at[1] < 22


def test_fewer_workers_than_the_fewest_end_the_run_with_what_is_missing(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10)], min_workers=8, node_wait_seconds=30, max_failures=2)
    case.at(9, "room", 7)
    with pytest.raises(RunError, match=r"3 times in a row .*room for 7 workers and the run needs at least 8"):
        case.supervisor.run()


def test_only_failures_without_a_new_checkpoint_count(tmp_path):
    """Ten lost nodes, each after progress, and twice nothing in between."""
    attempts = [(step, "die", 10) for step in (2, 4, 4, 4, 6, 8, 10, 10, 12, 14)]
    case = Case(tmp_path, 8, [*attempts, (20, "done", 10)], max_failures=2)
    assert case.supervisor.run() is not None
    assert len(case.cluster.sizes) == 11


def test_failures_without_progress_end_the_run_after_longer_and_longer_pauses(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), *[(4, "die", 10)] * 3], max_failures=2)
    with pytest.raises(
        RunError, match=r"3 times in a row without a new checkpoint.*max-failures 2.*rank 1 died\n.*step 4"
    ):
        case.supervisor.run()
    assert [event.kind for event in case.log()] == ["restart"] * 3 + ["failed"]
    assert "3 times in a row without a new checkpoint" in case.log()[-1].message
    assert [round(b - a - 10) for a, b in zip(case.cluster.started_at, case.cluster.started_at[1:], strict=False)] == [
        1,
        2,
        4,
    ]


def test_checkpoints_of_another_run_in_the_folder_are_no_progress(tmp_path):
    case = Case(tmp_path, 8, [(step, "shut out", 10) for step in (2, 4, 6, 8)], max_failures=2)
    with pytest.raises(RunError, match="3 times in a row without a new checkpoint"):
        case.supervisor.run()


def test_without_retries_a_failure_ends_the_run(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10)], max_failures=0)
    with pytest.raises(RunError, match="not started again"):
        case.supervisor.run()


def test_what_cannot_be_mended_is_not_tried_again(tmp_path):
    case = Case(tmp_path, 8, [(4, "refuse", 10)])
    with pytest.raises(RunError, match=r"^lower optimizer\.lr$"):
        case.supervisor.run()
    assert case.cluster.running == []


def test_a_run_grows_when_there_is_room_for_long_enough(tmp_path):
    """From 4 to 8 workers, not before the interval, nor while the room still changes; the first attempt saves."""
    case = Case(tmp_path, 4, [(6, "done", 1000), (12, "done", 10)], node_wait_seconds=5, grow_interval_seconds=100)
    case.at(20, "room", 8)
    case.at(105, "room", 6)
    case.at(112, "room", 8)
    case.supervisor.run()
    assert case.cluster.sizes == [4, 8]
    assert 127 <= case.cluster.started_at[1] < 135
    assert case.events() == ["8 workers instead of 4, with the same global batch"]


def test_a_run_never_grows_beyond_what_it_may_have(tmp_path):
    case = Case(tmp_path, 16, [(6, "done", 1000)], num_workers=4, grow_interval_seconds=0)
    case.supervisor.run()
    assert case.cluster.sizes == [4]


def test_a_preemption_notice_is_passed_on_as_a_request_to_save(tmp_path):
    case = Case(tmp_path, 8, [(6, "die", 30), (12, "done", 10)])
    case.at(10, "notice", "node 10.0.0.7 is about to be taken away")
    case.at(29, "notice", "")
    case.supervisor.run()
    saves = {asked for asked in case.cluster.asked if asked.request is Request.SAVE}
    assert saves == {Command(Request.SAVE, "node 10.0.0.7 is about to be taken away")}
    assert case.cluster.asked[-1] == Command()  # a new attempt is not asked for what the last one was


def test_a_node_lost_while_workers_are_placed_is_no_failure(tmp_path):
    case = Case(tmp_path, 8, [(12, "done", 10)], max_failures=0)
    case.cluster.lost_while_placing = 3
    case.supervisor.run()
    assert case.cluster.sizes == [8]


def test_asked_to_stop_the_run_saves_and_is_not_started_again(tmp_path):
    case = Case(tmp_path, 8, [(6, "done", 1000)])
    case.at(20, "stop", True, of_cluster=False)
    summary = case.supervisor.run()
    assert summary is not None
    assert not summary.completed
    assert case.cluster.asked[-1].request is Request.STOP


def test_asked_to_stop_while_it_waits_for_nodes_it_ends(tmp_path):
    case = Case(tmp_path, 1, [])
    case.at(20, "stop", True, of_cluster=False)
    assert case.supervisor.run() is None
    assert case.clock.now < 21


@pytest.mark.parametrize(("room", "workers"), [(0, 0), (1, 0), (2, 2), (3, 2), (6, 4), (9, 8), (15, 8), (1000, 16)])
def test_the_number_of_workers_divides_the_global_batch(tmp_path, room, workers):
    """Two context-parallel ranks, and eight sequences a step for at most eight data-parallel replicas."""
    assert usable_workers(load_config(write_config(tmp_path), ["training.global_batch_size=8"]), room) == workers


@pytest.mark.parametrize(("gpus", "workers"), [(0, 2), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_the_default_number_of_workers_is_what_the_run_can_use(tmp_path, gpus, workers):
    assert default_num_workers(load_config(write_config(tmp_path)), gpus) == workers


def test_too_few_gpus_for_one_replica_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"1 GPUs.* = 2: lower one"):
        default_num_workers(load_config(write_config(tmp_path)), 1)


def test_more_workers_than_this_machine_has_gpus_are_refused():
    check_local_gpus(2, 2)
    check_local_gpus(2, 0)  # CPU workers
    with pytest.raises(ConfigError, match=r"--num-workers 3: .* this machine has 2"):
        check_local_gpus(3, 2)


def test_pauses_grow_to_a_minute():
    retries = Retries(10, saved_step=5)
    assert [retries.pause_after_failure(5) for _ in range(7)] == [2, 4, 8, 16, 32, 60, 60]
    assert retries.pause_after_failure(6) == 1


def test_progress_after_a_damaged_checkpoint_was_set_aside_counts():
    retries = Retries(1, saved_step=0)
    assert [retries.pause_after_failure(step) for step in (12, 8, 10, 10, 10)] == [1, 2, 1, 2, None]


@pytest.mark.parametrize(("saved", "resume"), [(0, "auto"), (4, "never")])
def test_a_run_that_must_not_resume_goes_on_only_from_what_is_its_own(tmp_path, saved, resume):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)], resume="never", saved=saved)
    case.supervisor.run()
    assert [job.config.run.resume for job in case.cluster.jobs] == [resume, resume]


NODES = [
    Node("a", "10.0.0.1", room=4, free=1),
    Node("b", "10.0.0.2", room=4, free=4),
    Node("c", "10.0.0.3", room=4, free=2, leaves_at=0.0),
]


def test_room_is_what_is_free_and_what_is_held_on_nodes_that_stay():
    assert room_for_workers(NODES) == 5
    assert room_for_workers(NODES, held=["a", "a", "a", "c", "c", "lost"]) == 8


def test_nodes_with_gpus_may_come_after_the_run_has_started(monkeypatch):
    """No worker is placed on the CPUs of a node that came for its GPUs, and GPUs are what is asked for then."""
    nodes = {"CPU": 0, "GPU": 0}
    asked = []

    def alive_nodes(worker):
        room = nodes["GPU" if "GPU" in worker else "CPU"]
        return [Node("a", "10.0.0.1", room=room, free=room)]

    monkeypatch.setattr(ray_cluster, "alive_nodes", alive_nodes)
    monkeypatch.setattr(ray_cluster, "ask_for_nodes", lambda worker, workers: asked.append((worker, workers)))
    cluster = ray_cluster.RayCluster(start_seconds=1, answer_seconds=1)
    assert cluster.look().room == 0
    cluster.ask_for(32)
    nodes.update(CPU=192, GPU=8)
    assert cluster.look().room == 8
    nodes.update(GPU=0)  # taken back
    assert cluster.look().room == 0
    assert asked == [(CPU_WORKER, 32), (GPU_WORKER, 32)]


def test_only_a_node_in_use_gives_a_notice():
    assert preemption_notice(NODES, ["a", "b"]) == ""
    assert preemption_notice(NODES, ["a", "c"]) == "node 10.0.0.3 is about to be taken away"


@pytest.mark.parametrize("gpus", [("0", "2", "10"), ("GPU-0a", "GPU-4c", "MIG-17"), (None, None, None)])
def test_workers_are_ordered_by_node_and_gpu(gpus):
    expected = [("b", gpus[0]), ("b", gpus[2]), ("a", gpus[0]), ("a", gpus[1]), ("a", gpus[2])]
    found = [expected[index] for index in (1, 3, 4, 0, 2)]  # node b is met first
    places = [Place(node, "10.0.0.1", ProcessId(1, 1), gpu) for node, gpu in found]
    ordered = sorted(zip("vwxyz", places, strict=True), key=rank_order(places))
    assert [(place.node_id, place.gpu) for _, place in ordered] == expected


def test_ranks_of_a_node_are_neighbours_and_see_its_gpus():
    places = [Place(node, f"10.0.0.{node}", ProcessId(1, 1), gpu) for node, gpu in [("1", "0"), ("1", "2"), ("2", "1")]]
    found = rank_envs(places, 29400)
    assert [(env.rank, env.local_rank, env.local_world_size, env.gpus) for env in found] == [
        (0, 0, 2, ("0", "2")),
        (1, 1, 2, ("0", "2")),
        (2, 0, 1, ("1",)),
    ]
    assert {(env.master_address, env.master_port, env.world_size) for env in found} == {("10.0.0.1", 29400, 3)}
