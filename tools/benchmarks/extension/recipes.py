"""The runs of the extension: training from scratch, the two stages of its extension, and no training at all.

Knows settings; does not know files of text or results.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks.common.conversations import source
from tools.benchmarks.common.shapes import Shape
from tools.benchmarks.extension.corpus import COPIES, TEMPLATE, questions_of

Settings = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of one experiment.

    Attributes:
        lengths: tokens of a sequence in training from scratch and in the two stages of the extension.
        steps: of each of the three; those from scratch are on as much code as questions.
        tokens: of a global batch of each of the three.
        first_steps: on copies, and then on questions of the shortest length, before the first of the three. Without
            copies, models did not begin to learn such questions in 400 steps of 65,536 tokens.
        first_tokens: of a global batch in both.
        question_steps: from scratch, on questions of all lengths up to the first and little code, after the others.
        copies: documents of copies.
        copied: tokens of such a document.
        heldout: tokens of the held-out text, the same at all lengths.
        questions: documents with a question, by length in tokens, ascending.
        evaluated: tokens at which retrieval is tested, at most the last of `lengths`.
    """

    model: Settings
    chunk_size: int
    lengths: tuple[int, int, int]
    steps: tuple[int, int, int]
    tokens: tuple[int, int, int]
    first_steps: int
    first_tokens: int
    question_steps: int
    copies: int
    copied: int
    heldout: int
    megabytes: float
    questions: dict[int, int]
    evaluated: tuple[int, ...]


SIZES = {
    "gpu": Size(
        model=Shape(layers=8, hidden=512, ffn=1536, heads=4, kv_heads=2, head_dim=128).section(),
        chunk_size=64,
        lengths=(8192, 32768, 65536),
        steps=(500, 50, 50),
        tokens=(65536, 131072, 131072),
        first_steps=700,
        first_tokens=12288,
        question_steps=200,
        copies=40_000,
        copied=128,
        heldout=1_048_576,
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
        evaluated=(1024, 4096, 8192, 32768, 65536),
    ),
    "cpu": Size(
        model=Shape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16).section(),
        chunk_size=16,
        lengths=(1024, 2048, 4096),
        steps=(6, 3, 3),
        tokens=(4096, 4096, 4096),
        first_steps=2,
        first_tokens=768,
        question_steps=2,
        copies=16,
        copied=64,
        heldout=4 * 4096,
        megabytes=0.3,
        questions={384: 8, 512: 8, 1024: 4, 2048: 4, 4096: 2},
        evaluated=(1024, 2048, 4096),
    ),
}
_BASES = (10_000.0, 500_000.0)
"""Base of the rotary positions from scratch and of the extension."""
_WARMUP = 50
"""Steps of a stage from scratch in which its learning rate rises. With half as many, copying was learned late."""
_CODE = 0.3
"""Share of code in the tokens once the language is learned. Of questions, the answers alone count: a few per cent."""


def from_scratch(size: Size, folder: Path) -> Settings:
    """Dense attention at the first length, random weights."""
    length, shortest = size.lengths[0], min(size.questions)
    settings = _common(size, folder, "base")
    settings["attention"]["kind"] = "dense"
    settings["optimizer"] = {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": min(_WARMUP, size.first_steps // 2)}
    settings["training"] |= _batch(length, size.tokens[0], at_once=True)
    settings["evaluation"]["sequences"] = size.heldout // length
    settings["data"] |= {"documents": "joined", "cut_documents": length}
    settings["stages"] = [
        _answers(folder, size, "copies", COPIES, size.copied),
        _answers(folder, size, "short", questions_of(shortest), shortest),
        # Joined questions of the whole length would mostly be cut where a sequence ends.
        {
            "name": "code",
            "steps": size.steps[0],
            "data": {"sources": _code_and_questions(size, folder, length // 2, code=0.5)},
        },
        {
            "name": "questions",
            "steps": size.question_steps,
            "training": _batch(length, size.tokens[0]),
            "data": {"sources": _code_and_questions(size, folder, length), "documents": "separate"},
        },
    ]
    return settings


def _answers(folder: Path, size: Size, name: str, file: str, length: int) -> Settings:
    """Return a stage on documents of which the answers alone count."""
    batch = _batch(length, size.first_tokens, at_once=True)
    return {
        "name": name,
        "steps": size.first_steps,
        "training": batch,
        "data": {"sources": [_questions(folder, [file], f"{name} alone")]},
        "evaluation": {"sequences": batch["micro_batch_size"]},
    }


def extension(size: Size, folder: Path, weights: Path, kind: str) -> Settings:
    """The two stages of an extension with attention of a kind, from exported weights."""
    settings = _common(size, folder, kind)
    settings["attention"]["kind"] = kind
    settings["model"] |= {"weights": str(weights), "rotary_base": _BASES[1]}
    settings["optimizer"] = {"lr": 4e-4, "min_lr": 4e-5, "warmup_steps": max(1, size.steps[1] // 10)}
    _, *lengths = size.lengths
    settings["data"]["sources"] = _code_and_questions(size, folder, lengths[-1])
    settings["stages"] = [
        {
            "name": f"{length}",
            "steps": steps,
            "training": _batch(length, tokens),
            "data": {"sources": _code_and_questions(size, folder, length)},
            "evaluation": {"sequences": size.heldout // length},
        }
        for length, steps, tokens in zip(lengths, size.steps[1:], size.tokens[1:], strict=True)
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
                "sequences": size.heldout // size.lengths[-1],
                "buckets": [],
                "data": {"source": "files", "paths": str(folder / "text" / "heldout.jsonl"), "documents": "joined"},
            },
        }
    )


def _code_and_questions(size: Size, folder: Path, longest: int, *, code: float = _CODE) -> list[Settings]:
    """Return code as a share of the tokens, and questions of all lengths up to `longest`."""
    source_of_code = {"source": "files", "paths": str(folder / "text" / "train.jsonl"), "weight": code}
    files = [questions_of(length) for length in size.questions if length <= longest]
    return [source_of_code, _questions(folder, files, f"questions to {longest}") | {"weight": 1 - code}]


def _questions(folder: Path, files: Iterable[str], label: str) -> Settings:
    return source(label, [folder / name for name in files], folder / TEMPLATE)


def _batch(length: int, tokens: int, *, at_once: bool = False) -> Settings:
    """Return sizes of a batch; with `at_once`, all its sequences are in one pass."""
    sequences = max(1, tokens // length)
    return {
        "sequence_length": length,
        "global_batch_size": sequences,
        "micro_batch_size": sequences if at_once else 1,
    }
