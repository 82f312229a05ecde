"""One fault: its injection at its step, and the observation of the run until it has recovered.

Knows the required reaction to each kind of fault; does not know how one is made (`faults.py` does).
"""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dash_dist.run.events import EventKind
from tests.storm.cluster import LocalCluster, Node
from tests.storm.errors import StormError
from tests.storm.faults import (
    FullDisk,
    choose_node,
    damage_checkpoint,
    fail_in_part,
    kill_first_rank,
    kill_worker,
    stop_rank,
)
from tests.storm.processes import alive, describe, tree
from tests.storm.requests import Failure, Part
from tests.storm.schedule import Fault, FaultKind
from tests.storm.watch import RunWatch, saved_step

# From the announcement that a node will be taken away to its end.
DRAIN_SECONDS = 10

_POLL_SECONDS = 0.05

# After this time, work in progress of a killed rank is done or lost. The run is not restarted earlier.
_SETTLE_SECONDS = 0.3

_STEPS_WHILE_WRITING = 6

# Two, since one may be damaged.
_CHECKPOINTS_NEEDED = 2

# The required event of each fault, in addition to "restart" where ranks were lost.
_EVENTS: dict[FaultKind, EventKind] = {
    "worker_killed": "restart",
    "first_rank_killed": "restart",
    "node_killed": "restart",
    "node_drained": "preemption",
    "rank_stopped": "hang",
    "disk_full": "save_failed",
    "nan_batch": "batch_skipped",
    "checkpoint_damaged": "checkpoint_damaged",
    "killed_in_forward": "restart",
    "killed_in_exchange": "restart",
    "killed_in_optimizer": "restart",
    "killed_in_save": "restart",
    "out_of_memory_in_forward": "failed",
    "out_of_memory_in_backward": "failed",
    "out_of_memory_in_optimizer": "failed",
}

KILLED_IN: dict[FaultKind, Part] = {
    "killed_in_forward": "forward",
    "killed_in_exchange": "exchange",
    "killed_in_optimizer": "optimizer",
    "killed_in_save": "save",
}
OUT_OF_MEMORY_IN: dict[FaultKind, Part] = {
    "out_of_memory_in_forward": "forward",
    "out_of_memory_in_backward": "backward",
    "out_of_memory_in_optimizer": "optimizer",
}


@dataclass(frozen=True)
class Outcome:
    """One fault and the reaction of the run.

    Attributes:
        step: steps done when the fault was made.
        what: description of the fault.
        event: event that the run logged for it.
        resumed_at: step of the checkpoint that the run resumed from; None if no rank was lost.
        lost_steps: steps that were done again.
        recovery_seconds: seconds until the next step was done; where the run ends, its second start is included. For a
            full disk: from the release of space to the next complete checkpoint.
    """

    number: int
    kind: FaultKind
    step: int
    what: str
    event: EventKind
    resumed_at: int | None
    lost_steps: int
    recovery_seconds: float


class Trial:
    """Trial of one fault in one run.

    Args:
        fault: the fault to make.
        cluster, driver, watch: cluster, driver and observer of the run.
        start: starts another driver of the run.
        chance: source of the choices that the schedule leaves open.
        interval: steps between checkpoints.
        seconds: time limit to reach the fault's step, and again to recover.
        end_seconds: time limit for all processes of a run that fails for good.

    Attributes:
        driver: of the run; another one after `run` where the run had to be started again.
    """

    def __init__(
        self,
        fault: Fault,
        cluster: LocalCluster,
        driver: subprocess.Popen[bytes],
        watch: RunWatch,
        chance: random.Random,
        *,
        start: Callable[[], subprocess.Popen[bytes]],
        interval: int,
        seconds: float,
        end_seconds: float,
    ) -> None:
        self._fault = fault
        self._cluster = cluster
        self.driver = driver
        self._watch = watch
        self._chance = chance
        self._start = start
        self._interval = interval
        self._seconds = seconds
        self._end_seconds = end_seconds
        self._event = _EVENTS[fault.kind]
        self._before: Counter[str] = Counter()

    def run(self) -> Outcome:
        """Raises StormError for a run that ended, or did not recover in time or as it must."""
        if self._fault.kind == "nan_batch":
            return self._nan_batch()
        self._wait(
            lambda: (
                self._watch.step >= self._fault.step
                and len(self._watch.saved_steps()) >= _CHECKPOINTS_NEEDED
                and 0 in self._watch.ranks()
            ),
            f"at step {self._fault.step} with {_CHECKPOINTS_NEEDED} checkpoints",
        )
        self._before = Counter(event.kind for event in self._watch.events())
        if self._fault.kind == "disk_full":
            return self._full_disk()
        if self._fault.kind in OUT_OF_MEMORY_IN:
            return self._out_of_memory(OUT_OF_MEMORY_IN[self._fault.kind])
        return self._lost_ranks()

    def _nan_batch(self) -> Outcome:
        """The sequence is in the data since the run began: it only remains to wait for it."""
        step = self._fault.step
        self._wait(
            lambda: any(event.kind == self._event and event.step == step for event in self._watch.events()),
            f"an event {self._event} of step {step}",
        )
        self._wait(lambda: self._watch.step > step, "done with a step after it")
        made, gone_on = (min(one.time for one in self._watch.steps if one.step == s) for s in (step, step + 1))
        return self._outcome("the loss of a sequence was NaN", step=step, seconds=gone_on - made)

    def _full_disk(self) -> Outcome:
        step = self._watch.step
        disk = FullDisk(self._watch)
        what = disk.begin()
        self._wait_for_event(self._event)
        disk.end()
        freed = time.time()
        newest = self._watch.saved_steps()[-1]
        self._wait(lambda: self._watch.saved_steps()[-1] > newest, "writing checkpoints again")
        return self._outcome(what, step=step, seconds=time.time() - freed)

    def _lost_ranks(self) -> Outcome:
        draining = self._drain() if self._fault.kind == "node_drained" else None
        old = frozenset(process.pid for process in self._watch.ranks().values())
        good = self._watch.saved_steps()
        made = time.time()
        match self._fault.kind:
            case "first_rank_killed":
                what = kill_first_rank(self._watch)
            case "rank_stopped":
                what = stop_rank(self._watch, self._chance)
            case "node_killed":
                what = self._lose_node(choose_node(self._cluster, self._watch, self._chance))
            case "node_drained":
                assert draining is not None
                what = f"announced {DRAIN_SECONDS} s before: {self._lose_node(draining)}"
            case kind if kind in KILLED_IN:
                what, made = self._fail_in(KILLED_IN[kind], "killed")
                good = self._watch.saved_steps()
            case "checkpoint_damaged":
                what = kill_worker(self._watch, self._chance)
                time.sleep(_SETTLE_SECONDS)
                newest = self._watch.checkpoints()[-1]
                what = f"{what}; {damage_checkpoint(newest, self._chance)}"
                good = [step for step in good if step != saved_step(newest)]
            case _:
                what = kill_worker(self._watch, self._chance)
        self._wait_for_event("restart")
        self._wait_for_event(self._event)
        return self._recovered(what, made, old, good)

    def _out_of_memory(self, part: Part) -> Outcome:
        """Let memory run out at one rank, which ends the run for good; start it again, as a user would."""
        ranks = self._watch.ranks()
        processes = [one for rank in ranks.values() for one in tree(rank)]
        what, made = self._fail_in(part, "out_of_memory")
        deadline = made + self._end_seconds
        while left := [one for one in processes if alive(one)]:
            if time.time() > deadline:
                raise StormError(f"{what}: after {self._end_seconds:.0f} s are left {[*map(describe, left)]}")
            time.sleep(_POLL_SECONDS)
        try:
            status = self.driver.wait(timeout=max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            raise StormError(f"{what}: the driver has not ended after {self._end_seconds:.0f} s") from None
        ended = time.time()
        if status == 0:
            raise StormError(f"{what}: the driver ended with status 0")
        events = self._watch.events()[self._before.total() :]
        if [event.kind for event in events] != [self._event] or "out of memory" not in events[0].message:
            raise StormError(f"{what}: one event {self._event} was to name it, and these came: {events}")
        good = self._watch.saved_steps()
        self.driver = self._start()
        what = f"{what}; all ended after {ended - made:.0f} s, started again"
        return self._recovered(what, made, frozenset(process.pid for process in ranks.values()), good)

    def _fail_in(self, part: Part, failure: Failure) -> tuple[str, float]:
        """Let a rank fail in a part of a step; returns the description and the time of the fault."""
        what = fail_in_part(self._watch, self._chance, part, failure)
        self._wait(lambda: self._watch.requests.obeyed_at() is not None, f"in the {part} of a step")
        made = self._watch.requests.obeyed_at()
        assert made is not None
        return what, made

    def _recovered(self, what: str, made: float, old: frozenset[int], good: list[int]) -> Outcome:
        """Wait until the run has passed the step that it had reached.

        Args:
            made: time of the fault.
            old: process ids of the ranks before it.
            good: steps of the undamaged checkpoints at that time.
        """
        self._watch.refresh()  # the ranks went on until the fault, which may come steps after its request
        reached = max(one.step for one in self._watch.steps if one.pid in old)
        self._wait(
            lambda: any(one.step > reached for one in self._watch.steps_since(made, not_of=old)),
            f"beyond step {reached}, which it had reached",
        )
        new = self._watch.steps_since(made, not_of=old)
        resumed_at = new[0].step - 1
        if resumed_at < good[-1]:
            raise StormError(f"{what}: went on from step {resumed_at}, and there was a checkpoint of step {good[-1]}")
        # One interval, what was trained while the newest checkpoint was being written, one more where that is damaged.
        allowed = self._interval * (2 if self._fault.kind == "checkpoint_damaged" else 1) + _STEPS_WHILE_WRITING
        if reached - resumed_at > allowed:
            raise StormError(f"{what}: {reached - resumed_at} steps were lost, more than {allowed}")
        return self._outcome(what, step=reached, resumed_at=resumed_at, seconds=new[0].time - made)

    def _drain(self) -> Node:
        """Announce the end of a node with ranks, and return the node when its time has come."""
        node = choose_node(self._cluster, self._watch, self._chance)
        begun = time.monotonic()
        self._cluster.drain(node, seconds=DRAIN_SECONDS)
        reached = self._watch.step
        self._wait_for_event("preemption")
        self._wait(lambda: self._watch.saved_steps()[-1] >= reached, f"saved at step {reached} or later")
        time.sleep(max(0.0, begun + DRAIN_SECONDS - time.monotonic()))
        return node

    def _lose_node(self, node: Node) -> str:
        """Kill a node and add another one, with its GPU; a spare node continues meanwhile."""
        ranks = {process.pid: rank for rank, process in self._watch.ranks().items()}
        held = sorted(ranks[process.pid] for process in node.processes() if process.pid in ranks)
        left = self._cluster.lose(node)
        if left:
            raise StormError(f"processes of the lost node {node.address} went on: {left}")
        self._cluster.add_node(cpus=node.cpus, gpu=node.gpu)
        return f"SIGKILL to the raylet of ranks {', '.join(map(str, held))}"

    def _wait_for_event(self, kind: EventKind) -> None:
        self._wait(
            lambda: Counter(event.kind for event in self._watch.events())[kind] > self._before[kind],
            f"an event {kind}",
        )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._seconds
        while not condition():
            if self.driver.poll() is not None:
                raise StormError(f"{self._fault}: the run ended with status {self.driver.returncode} and not {what}")
            if time.monotonic() > deadline:
                raise StormError(f"{self._fault}: after {self._seconds:.0f} s not {what}")
            time.sleep(_POLL_SECONDS)

    def _outcome(self, what: str, *, step: int, seconds: float, resumed_at: int | None = None) -> Outcome:
        return Outcome(
            number=self._fault.number,
            kind=self._fault.kind,
            step=step,
            what=what,
            event=self._event,
            resumed_at=resumed_at,
            lost_steps=0 if resumed_at is None else step - resumed_at,
            recovery_seconds=seconds,
        )
