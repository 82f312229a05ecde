"""Schedule of faults, drawn from a seed before the run starts.

Knows kinds of faults and steps; does not know how a fault is made.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

FaultKind = Literal[
    "worker_killed",  # SIGKILL to a rank
    "first_rank_killed",  # SIGKILL to rank 0, which prints and writes for the others
    "node_killed",  # SIGKILL to a raylet that holds ranks
    "node_drained",  # a raylet that holds ranks announces its end, which comes seconds later
    "rank_stopped",  # SIGSTOP to a rank, which then neither answers nor dies
    "disk_full",  # the ranks' writes fail beyond a file size, until the run has noticed
    "nan_batch",  # a sequence whose loss is NaN
    "checkpoint_damaged",  # bits of the newest checkpoint flip, or a file is cut short; then a rank is killed
    "killed_in_forward",  # a rank gets SIGKILL within a part of a step, in this kind and the next three
    "killed_in_exchange",
    "killed_in_optimizer",
    "killed_in_save",
    "out_of_memory_in_forward",  # an allocation fails at one rank, in this kind and the next two
    "out_of_memory_in_backward",
    "out_of_memory_in_optimizer",
]

FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

# Those of the quick form, which continuous integration runs: half of all, since each costs about half a minute.
QUICK_KINDS = FAULT_KINDS[:8]

# Relative frequency of each kind in a long storm.
_WEIGHTS: dict[FaultKind, int] = {
    "worker_killed": 2,
    "first_rank_killed": 1,
    "node_killed": 2,
    "node_drained": 1,
    "rank_stopped": 2,
    "disk_full": 2,
    "nan_batch": 3,
    "checkpoint_damaged": 2,
    "killed_in_forward": 1,
    "killed_in_exchange": 1,
    "killed_in_optimizer": 1,
    "killed_in_save": 1,
    "out_of_memory_in_forward": 1,
    "out_of_memory_in_backward": 1,
    "out_of_memory_in_optimizer": 1,
}


@dataclass(frozen=True)
class Fault:
    """One fault, made after `step` is done, at once or in the next part of a step that it names.

    For a NaN batch, `step` is the one that trains on it.
    """

    number: int
    kind: FaultKind
    step: int


@dataclass(frozen=True)
class Schedule:
    """The faults in order, and the steps of the run."""

    faults: list[Fault]
    steps: int

    @property
    def nan_steps(self) -> list[int]:
        return [fault.step for fault in self.faults if fault.kind == "nan_batch"]


def draw_schedule(
    *, faults: int, seed: int, interval: int, drain_steps: int, kinds: Sequence[FaultKind] = FAULT_KINDS
) -> Schedule:
    """Draw a schedule that has every one of `kinds`, if `faults` allows it.

    The first fault comes after two checkpoints. The steps between two faults leave time for a checkpoint, so that the
    recovery from one does not cover the next.

    Args:
        faults: number of faults.
        interval: steps between checkpoints of the run.
        drain_steps: most steps between the announcement of a node's end and that end.
        kinds: kinds of faults, each once in the list.
    """
    chance = random.Random(seed)
    chosen = list(kinds[:faults])
    chosen += chance.choices(kinds, weights=[_WEIGHTS[kind] for kind in kinds], k=faults - len(chosen))
    chance.shuffle(chosen)
    # Steps from the moment of the schedule to the fault itself: a save begins at a multiple of the interval.
    delays = {"node_drained": drain_steps, "killed_in_save": 2 * interval}
    drawn: list[Fault] = []
    step = 2 * interval
    for number, kind in enumerate(chosen, start=1):
        step += chance.randint(interval // 2, 2 * interval)
        drawn.append(Fault(number, kind, step))
        step += delays.get(kind, 0)
    return Schedule(drawn, steps=step + 3 * interval)
