"""Which faults come when: drawn from a seed, known before the run starts.

Knows kinds of faults and steps; does not know how a fault is made.
"""

from __future__ import annotations

import random
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
]

FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

# How often each comes in a long storm, relative to the others.
_WEIGHTS: dict[FaultKind, int] = {
    "worker_killed": 2,
    "first_rank_killed": 1,
    "node_killed": 2,
    "node_drained": 1,
    "rank_stopped": 2,
    "disk_full": 2,
    "nan_batch": 3,
    "checkpoint_damaged": 2,
}


@dataclass(frozen=True)
class Fault:
    """`step`: it is made once this step is done; of a NaN batch the step that trains on it."""

    number: int
    kind: FaultKind
    step: int


@dataclass(frozen=True)
class Schedule:
    """The faults in order, and how many steps the run takes."""

    faults: list[Fault]
    steps: int

    @property
    def nan_steps(self) -> list[int]:
        return [fault.step for fault in self.faults if fault.kind == "nan_batch"]


def draw_schedule(*, faults: int, seed: int, interval: int, drain_steps: int) -> Schedule:
    """`faults` faults, every kind among them if there are enough of them; `interval` is the run's, between checkpoints.

    The first comes after two checkpoints. Between two lie enough steps for a checkpoint, so that a fault is not
    answered by the recovery from the one before; and after the announcement of a node's end the `drain_steps` that the
    run may do until then.
    """
    chance = random.Random(seed)
    kinds = list(FAULT_KINDS[:faults])
    kinds += chance.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()), k=faults - len(kinds))
    chance.shuffle(kinds)
    drawn: list[Fault] = []
    step = 2 * interval
    for number, kind in enumerate(kinds, start=1):
        step += chance.randint(interval // 2, 2 * interval)
        drawn.append(Fault(number, kind, step))
        step += drain_steps if kind == "node_drained" else 0
    return Schedule(drawn, steps=step + 3 * interval)
