"""The runs of the extension: training from scratch, the two stages of its extension, and no training at all.

Knows settings; does not know files of text or results.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks.common.shapes import Shape
from tools.benchmarks.extension.corpus import questions_of

Settings = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of one experiment.

    Attributes:
        lengths: tokens of a sequence in training from scratch and in the two stages of the extension.
        steps: of each of the three.
        first_steps: before those from scratch, on documents with a question of the shortest length alone. Half of the
            tokens that are not a sentence known by heart are then an answer.
        questions: documents with a question, by length in tokens, ascending. A short one teaches as much as a long
            one, and the same tokens hold many more of them.
        tokens: of a global batch.
    """

    model: Settings
    chunk_size: int
    lengths: tuple[int, int, int]
    steps: tuple[int, int, int]
    first_steps: int
    tokens: int
    heldout: int
    megabytes: float
    questions: dict[int, int]


SIZES = {
    "gpu": Size(
        model=Shape(layers=8, hidden=512, ffn=1536, heads=4, kv_heads=2, head_dim=128).section(),
        chunk_size=64,
        lengths=(8192, 32768, 65536),
        steps=(500, 40, 40),
        first_steps=150,
        tokens=131072,
        heldout=8,
        megabytes=60,
        questions={384: 50_000, 512: 12_000, 1024: 6_000, 2048: 3_000, 4096: 1_000, 8192: 500, 32768: 64, 65536: 32},
    ),
    "cpu": Size(
        model=Shape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16).section(),
        chunk_size=16,
        lengths=(512, 1024, 2048),
        steps=(6, 3, 3),
        first_steps=2,
        tokens=2048,
        heldout=2,
        megabytes=0.3,
        questions={384: 8, 512: 8, 1024: 4, 2048: 4},
    ),
}
_BASES = (10_000.0, 500_000.0)
"""Base of the rotary positions from scratch and of the extension."""


def from_scratch(size: Size, folder: Path) -> Settings:
    """Dense attention at the first length, random weights."""
    settings = _common(size, folder, "base")
    settings["attention"]["kind"] = "dense"
    settings["optimizer"] = {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": max(1, size.steps[0] // 20)}
    settings["training"] |= _lengths(size, 0)
    first = {"sources": [_questions(folder, [min(size.questions)], "short questions")]}
    settings["stages"] = [
        {"name": "questions", "steps": size.first_steps, "data": first},
        {"name": f"{size.lengths[0]}", "steps": size.steps[0]},
    ]
    return settings


def extension(size: Size, folder: Path, weights: Path, kind: str) -> Settings:
    """The two stages of an extension with attention of a kind, from exported weights."""
    settings = _common(size, folder, kind)
    settings["attention"]["kind"] = kind
    settings["model"] |= {"weights": str(weights), "rotary_base": _BASES[1]}
    settings["optimizer"] = {"lr": 4e-4, "min_lr": 4e-5, "warmup_steps": max(1, size.steps[1] // 10)}
    settings["stages"] = [
        {"name": f"{size.lengths[stage]}", "steps": size.steps[stage], "training": _lengths(size, stage)}
        for stage in (1, 2)
    ]
    return settings


def untrained(size: Size, folder: Path, weights: Path) -> Settings:
    """The exported weights as they are at the last length: one step of a learning rate that changes nothing."""
    settings = extension(size, folder, weights, "dense")
    del settings["stages"]
    settings["run"]["name"] = "untrained"
    settings["optimizer"] = {"lr": 1e-30}
    settings["training"] |= _lengths(size, 2) | {"steps": 1}
    return settings


def _common(size: Size, folder: Path, name: str) -> Settings:
    code = {"source": "files", "paths": str(folder / "text" / "train.jsonl"), "weight": 0.5}
    return copy.deepcopy(
        {
            "run": {"name": name, "directory": str(folder / "runs")},
            "model": {**size.model, "rotary_base": _BASES[0]},
            "attention": {"chunk_size": size.chunk_size},
            "data": {
                "sources": [code, _questions(folder, size.questions, "questions")],
                "cache": str(folder / "tokens"),
                "documents": "separate",
            },
            "training": {},
            "checkpoint": {"interval": 100_000, "asynchronous": False},
            "logging": {"interval": 10, "routing_interval": 20, "heat_map_layers": []},
            "evaluation": {
                "interval": 100_000,
                "sequences": size.heldout,
                "buckets": [],
                "data": {"source": "files", "paths": str(folder / "text" / "heldout.jsonl"), "documents": "joined"},
            },
        }
    )


def _questions(folder: Path, lengths: Iterable[int], label: str) -> Settings:
    """Return the source of documents with a question, of some lengths in tokens."""
    paths = [str(folder / questions_of(length)) for length in lengths]
    return {"label": label, "source": "files", "paths": paths, "weight": 0.5}


def _lengths(size: Size, stage: int) -> Settings:
    length = size.lengths[stage]
    return {"sequence_length": length, "global_batch_size": max(1, size.tokens // length)}
