"""Runs of the engines benchmark: one model and one order of data, at every layout and engine of up to two GPUs.

Knows configurations; does not know how runs are started or measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.benchmarks.common.configurations import changed, run_section, write_configuration
from tools.benchmarks.common.shapes import SHAPES

STEPS = 12
SAVES_EVERY = 6
"""Steps between the saves of runs that save: the second interval shows what a step costs while the first is written."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        changes: sections and keys that differ from `settings`; a key without a section for those of the whole run.
        saves: the run saves while it trains.
    """

    name: str
    gpus: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    saves: bool = False


def _zero(stage: int) -> Case:
    changes = {"engine": "deepspeed", "deepspeed": {"zero_stage": stage}, "parallel": {"context": 2}}
    return Case(f"DeepSpeed ZeRO {stage}, CP 2", 2, changes)


CASES = (
    Case("one GPU"),
    Case("one GPU, saves", saves=True),
    Case("CP 2", 2, {"parallel": {"context": 2}}),
    Case("CP 2, sharded optimizer, saves", 2, {"parallel": {"context": 2, "distributed_optimizer": True}}, saves=True),
    Case("TP 2", 2, {"parallel": {"tensor": 2}}),
    Case("TP 2, whole residual stream", 2, {"parallel": {"tensor": 2, "sequence_parallel": False}}),
    Case("PP 2", 2, {"parallel": {"pipeline": 2}}),
    Case("DP 2", 2),
    *(_zero(stage) for stage in (1, 2, 3)),
)


def settings(case: Case, shape: str, tokens: int, folder: Path) -> dict[str, Any]:
    """A run's configuration: weights of one seed, bytes of Python's library, two sequences a step."""
    run: dict[str, Any] = {
        "run": run_section(case.name, folder),
        "model": SHAPES[shape].section(),
        "attention": {"routing_scale": 32},  # at 1 an untrained model selects every chunk
        "parallel": {"recompute": "selective", "context": 1},
        "data": {"source": "stdlib", "tokenizer": "bytes", "cache": str(folder / "tokens")},
        "optimizer": {"lr": 1e-4},
        "training": {"steps": STEPS, "sequence_length": tokens, "global_batch_size": 2},
        "checkpoint": {"interval": SAVES_EVERY if case.saves else 10_000},
        "logging": {"interval": 1, "routing_interval": 10_000},
    }
    return changed(run, case.changes)


def write(case: Case, shape: str, tokens: int, folder: Path) -> Path:
    """Write a case's configuration into `folder`; returns the file."""
    return write_configuration(settings(case, shape, tokens, folder), folder)
