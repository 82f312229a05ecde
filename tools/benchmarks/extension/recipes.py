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
from tools.benchmarks.extension.corpus import COPIES, questions_of

Settings = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of one experiment.

    Attributes:
        lengths: tokens of a sequence in training from scratch and in the two stages of the extension.
        steps: of each of the three.
        tokens: of a global batch of each of the three.
        first_steps: on copies, and then on questions of the shortest length, before the first of the three. Without
            copies, models did not begin to learn such questions in 400 steps of 65,536 tokens.
        first_tokens: of a global batch in both.
        copies: documents of copies.
        copied: tokens of such a document.
        questions: documents with a question, by length in tokens, ascending.
    """

    model: Settings
    chunk_size: int
    lengths: tuple[int, int, int]
    steps: tuple[int, int, int]
    tokens: tuple[int, int, int]
    first_steps: int
    first_tokens: int
    copies: int
    copied: int
    heldout: int
    megabytes: float
    questions: dict[int, int]


SIZES = {
    "gpu": Size(
        model=Shape(layers=8, hidden=512, ffn=1536, heads=4, kv_heads=2, head_dim=128).section(),
        chunk_size=64,
        lengths=(8192, 32768, 65536),
        steps=(900, 50, 50),
        tokens=(65536, 131072, 131072),
        first_steps=1000,
        first_tokens=12288,
        copies=40_000,
        copied=128,
        heldout=8,
        megabytes=60,
        questions={
            384: 16_000,
            512: 8_000,
            1024: 4_000,
            2048: 2_000,
            4096: 1_000,
            8192: 400,
            16384: 120,
            32768: 60,
            65536: 30,
        },
    ),
    "cpu": Size(
        model=Shape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16).section(),
        chunk_size=16,
        lengths=(512, 1024, 2048),
        steps=(6, 3, 3),
        tokens=(2048, 2048, 2048),
        first_steps=2,
        first_tokens=768,
        copies=16,
        copied=64,
        heldout=4,
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
    settings["optimizer"] = {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": max(1, size.first_steps // 10)}
    shortest, *longer = (length for length in size.questions if length <= size.lengths[0])
    settings["data"] |= {
        "documents": "joined",
        "sources": _sources(folder, longer),
        "cut_documents": size.lengths[0],
    }
    settings["training"] |= _at_once(size.lengths[0], size.tokens[0])
    settings["stages"] = [
        _first(size, folder, "copies", size.copied, COPIES),
        _first(size, folder, "questions", shortest, questions_of(shortest)),
    ]
    settings["stages"].append({"name": f"{size.lengths[0]}", "steps": size.steps[0]})
    return settings


def _first(size: Size, folder: Path, name: str, length: int, file: str) -> Settings:
    """Return a stage on the documents of a file, which have a sequence each."""
    batch = _at_once(length, size.first_tokens)
    return {
        "name": name,
        "steps": size.first_steps,
        "training": batch,
        "evaluation": {"sequences": batch["micro_batch_size"]},
        "data": {"sources": [_answers(folder, [file], f"first {name}")]},
    }


def extension(size: Size, folder: Path, weights: Path, kind: str) -> Settings:
    """The two stages of an extension with attention of a kind, from exported weights."""
    settings = _common(size, folder, kind)
    settings["attention"]["kind"] = kind
    settings["model"] |= {"weights": str(weights), "rotary_base": _BASES[1]}
    settings["data"]["sources"] = _sources(folder, [length for length in size.questions if length >= size.lengths[0]])
    settings["optimizer"] = {"lr": 4e-4, "min_lr": 4e-5, "warmup_steps": max(1, size.steps[1] // 10)}
    settings["stages"] = [
        {
            "name": f"{size.lengths[stage]}",
            "steps": size.steps[stage],
            "training": _batch(size.lengths[stage], size.tokens[stage]),
        }
        for stage in (1, 2)
    ]
    return settings


def untrained(size: Size, folder: Path, weights: Path) -> Settings:
    """The exported weights as they are at the last length: one step of a learning rate that changes nothing."""
    settings = extension(size, folder, weights, "dense")
    del settings["stages"]
    settings["run"]["name"] = "untrained"
    settings["optimizer"] = {"lr": 1e-30}
    settings["training"] |= _batch(size.lengths[2], size.tokens[2]) | {"steps": 1}
    return settings


def _common(size: Size, folder: Path, name: str) -> Settings:
    return copy.deepcopy(
        {
            "run": {"name": name, "directory": str(folder / "runs")},
            "model": {**size.model, "tie_embeddings": False, "rotary_base": _BASES[0]},
            "attention": {"chunk_size": size.chunk_size},
            "data": {"cache": str(folder / "tokens"), "documents": "separate"},
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


def _sources(folder: Path, lengths: Iterable[int]) -> list[Settings]:
    """Return code, and questions of some lengths in tokens."""
    code = {"source": "files", "paths": str(folder / "text" / "train.jsonl"), "weight": 0.6}
    return [code, _answers(folder, map(questions_of, lengths), "questions") | {"weight": 0.4}]


def _answers(folder: Path, names: Iterable[str], label: str) -> Settings:
    """Return the source of documents of which the answers count."""
    return {"label": label, "source": "files", "paths": [str(folder / name) for name in names], "rows": "completions"}


def _batch(length: int, tokens: int) -> Settings:
    return {"sequence_length": length, "global_batch_size": max(1, tokens // length)}


def _at_once(length: int, tokens: int) -> Settings:
    """Return the same, all sequences in one pass."""
    batch = _batch(length, tokens)
    return batch | {"micro_batch_size": batch["global_batch_size"]}
