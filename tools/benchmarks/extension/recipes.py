"""The runs of the extension: training from scratch, the two stages with each attention, and no training at all.

Knows settings; does not know files of text or results.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dash_dist.config.model import ModelConfig
from tools.benchmarks.common.conversations import source
from tools.benchmarks.common.shapes import Shape
from tools.benchmarks.extension.corpus import COPIES, TEMPLATE, questions_of

Settings = dict[str, Any]


@dataclass(frozen=True)
class Scratch:
    """Training of a small model on bytes, with dense attention.

    Attributes:
        steps: on code and questions in equal parts.
        tokens: of a global batch.
        first_steps: on copies, and then on questions of the shortest length, before that. Without copies, models did
            not begin to learn such questions in 400 steps of 65,536 tokens.
        first_tokens: of a global batch in both.
        question_steps: on questions of all lengths up to the model's and little code, after the others.
        copies: documents of copies.
        copied: tokens of such a document.
    """

    model: Settings
    steps: int
    tokens: int
    first_steps: int
    first_tokens: int
    question_steps: int
    copies: int
    copied: int


@dataclass(frozen=True)
class Size:
    """Sizes of one experiment.

    Attributes:
        scratch: of the model where none is given.
        lengths: tokens of a sequence: of the model, and in the two stages of the extension.
        steps: of each stage.
        tokens: of a global batch of each stage.
        heldout: tokens of the held-out text, the same at all lengths.
        questions: documents with a question, by length in tokens, ascending.
        evaluated: tokens at which retrieval is tested, at most the last of `lengths`.
    """

    scratch: Scratch
    chunk_size: int
    lengths: tuple[int, int, int]
    steps: tuple[int, int]
    tokens: tuple[int, int]
    heldout: int
    megabytes: float
    questions: dict[int, int]
    evaluated: tuple[int, ...]


@dataclass(frozen=True)
class Base:
    """The dense model that is extended.

    Attributes:
        weights: folder that `dash-dist import` wrote.
        section: `model` of its configuration.
        tokenizer: as `data.tokenizer`.
    """

    weights: Path
    section: Settings
    tokenizer: str

    @property
    def model(self) -> ModelConfig:
        """The section with what it leaves out."""
        return ModelConfig(**self.section)


BYTES = "bytes"
"""Tokenizer of the model that is trained here."""
ATTENTION: dict[str, Settings] = {
    "dense": {"kind": "dense"},
    "dash": {"kind": "dash"},
    "dash_first_chunk": {"kind": "dash", "attend_first_chunk": True},
}
"""Of the extended models, by the name of their run."""
_GPU = Size(
    scratch=Scratch(
        model=Shape(layers=8, hidden=512, ffn=1536, heads=4, kv_heads=2, head_dim=128).section(),
        steps=500,
        tokens=65536,
        first_steps=700,
        first_tokens=12288,
        question_steps=200,
        copies=40_000,
        copied=128,
    ),
    chunk_size=64,
    lengths=(8192, 32768, 65536),
    steps=(50, 50),
    tokens=(131072, 131072),
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
)
SIZES = {
    "gpu": _GPU,
    "short": replace(
        _GPU,
        steps=(30, 30),
        tokens=(131072, 65536),
        heldout=262_144,
        megabytes=16,
        questions={1024: 400, 4096: 150, 8192: 80, 16384: 60, 32768: 40, 65536: 24},
        evaluated=(8192, 32768, 65536),
    ),
    "cpu": Size(
        scratch=Scratch(
            model=Shape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16).section(),
            steps=6,
            tokens=4096,
            first_steps=2,
            first_tokens=768,
            question_steps=2,
            copies=16,
            copied=64,
        ),
        chunk_size=16,
        lengths=(1024, 2048, 4096),
        steps=(3, 3),
        tokens=(4096, 4096),
        heldout=4 * 4096,
        megabytes=0.3,
        questions={384: 8, 512: 8, 1024: 4, 2048: 4, 4096: 2},
        evaluated=(1024, 2048, 4096),
    ),
}
_FIRST_BASE = 10_000.0
"""Base of the rotary positions of training from scratch."""
_WARMUP = 50
"""Steps of a stage from scratch in which its learning rate rises. With half as many, copying was learned late."""
_CODE = 0.3
"""Share of code in the tokens once the language is learned. Of questions, the answers alone count: a few per cent."""


def from_scratch(size: Size, folder: Path) -> Settings:
    """Dense attention at the first length, random weights."""
    scratch, length, shortest = size.scratch, size.lengths[0], min(size.questions)
    settings = _common(size, folder, "base")
    settings["model"] = {**scratch.model, "tie_embeddings": False, "rotary_base": _FIRST_BASE}
    settings["attention"]["kind"] = "dense"
    settings["optimizer"] = {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": min(_WARMUP, scratch.first_steps // 2)}
    settings["training"] |= _batch(length, scratch.tokens, at_once=True)
    settings["evaluation"]["sequences"] = size.heldout // length
    settings["data"] |= {"documents": "joined", "cut_documents": length}
    settings["stages"] = [
        _answers(folder, scratch, "copies", COPIES, scratch.copied),
        _answers(folder, scratch, "short", questions_of(shortest), shortest),
        # Joined questions of the whole length would mostly be cut where a sequence ends.
        {
            "name": "code",
            "steps": scratch.steps,
            "data": {"sources": _code_and_questions(size, folder, length // 2, code=0.5)},
        },
        {
            "name": "questions",
            "steps": scratch.question_steps,
            "training": _batch(length, scratch.tokens),
            "data": {"sources": _code_and_questions(size, folder, length), "documents": "separate"},
        },
    ]
    return settings


def _answers(folder: Path, scratch: Scratch, name: str, file: str, length: int) -> Settings:
    """Return a stage on documents of which the answers alone count."""
    batch = _batch(length, scratch.first_tokens, at_once=True)
    return {
        "name": name,
        "steps": scratch.first_steps,
        "training": batch,
        "data": {"sources": [_questions(folder, [file], f"{name} alone")]},
        "evaluation": {"sequences": batch["micro_batch_size"]},
    }


def extension(size: Size, folder: Path, base: Base, name: str) -> Settings:
    """The two stages of an extension with the attention of a name, from the weights of `base`."""
    settings = _of_base(size, folder, base, name, ATTENTION[name])
    settings["optimizer"] = {"lr": 4e-4, "min_lr": 4e-5, "warmup_steps": max(1, size.steps[0] // 10)}
    first, *lengths = size.lengths
    settings["stages"] = [
        {
            "name": f"{length}",
            "steps": steps,
            "model": _positions(base, first, length),
            "training": _batch(length, tokens),
            "data": {"sources": _code_and_questions(size, folder, length)},
            "evaluation": {"sequences": size.heldout // length},
        }
        for length, steps, tokens in zip(lengths, size.steps, size.tokens, strict=True)
    ]
    return settings


def unchanged(size: Size, folder: Path, base: Base, name: str, length: int) -> Settings:
    """The weights of `base` as they are, at a length: one step of a learning rate that changes nothing."""
    settings = _of_base(size, folder, base, name, ATTENTION["dense"])
    settings["model"] |= _positions(base, size.lengths[0], length)
    settings["optimizer"] = {"lr": 1e-30}
    settings["training"] |= _batch(length, length) | {"steps": 1}
    settings["evaluation"]["sequences"] = size.heldout // length
    return settings


def _of_base(size: Size, folder: Path, base: Base, name: str, attention: Settings) -> Settings:
    settings = _common(size, folder, name)
    settings["model"] = {**base.section, "weights": str(base.weights)}
    settings["attention"] |= attention
    settings["parallel"] = {"recompute": "selective"}
    settings["data"] |= {
        "tokenizer": base.tokenizer,
        "sources": _code_and_questions(size, folder, size.lengths[-1]),
    }
    return settings


def _positions(base: Base, first: int, length: int) -> Settings:
    """Return the settings of positions for sequences of `length` tokens, of a model for `first` tokens.

    The rotary base grows as in the NTK-aware scaling: the longest wave by the factor, the shortest not at all.
    """
    model = base.model
    head_dim = model.resolved_head_dim
    growth = (length / first) ** (head_dim / (head_dim - 2))
    return {"rotary_base": float(round(model.rotary_base * growth)), "positions": {"max_positions": length}}


def _common(size: Size, folder: Path, name: str) -> Settings:
    return copy.deepcopy(
        {
            "run": {"name": name, "directory": str(folder / "runs")},
            "attention": {"chunk_size": size.chunk_size},
            "data": {"cache": str(folder / "tokens"), "documents": "separate"},
            "training": {},
            "checkpoint": {"interval": 100_000, "asynchronous": False},
            "logging": {"interval": 10, "routing_interval": 20, "heat_map_layers": []},
            "evaluation": {
                "interval": 100_000,
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
