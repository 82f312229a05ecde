"""Sizes of the study's models and texts: for one GPU, and for a trial on a CPU.

Knows numbers; does not know methods or tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.benchmarks.common.shapes import Shape

Settings = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One kind of training.

    Attributes:
        model: section `model:` of a configuration, without positions.
        tokens: of a step.
        lr: largest learning rate; it decays to a tenth.
    """

    model: Settings
    tokens: int
    steps: int
    lr: float


@dataclass(frozen=True)
class Size:
    """Sizes of one study.

    Attributes:
        chunk_size: of all methods but those that name another; also symbols of a cell in the texts of the tasks.
        first_steps: of a task's training on copies, and then on short texts of few facts. A model that has not learned
            the first does not learn the second, nor does it begin to learn from long texts.
        first_tokens: of each of those steps; many small steps teach what few large ones do not.
        copies, copied: documents of copies, and tokens of each.
        first_texts: their number.
        texts: of each task for training after them, their number by length in tokens, ascending. Each length has a
            stage of `tasks.steps` on the texts up to that length, with the same share of the tokens.
        lengths: tokens at which a task is tested, longer than trained ones too.
        samples: texts of each length.
        budgets: chunks that the methods with a fixed number select, ascending; the second one is of all parts.
        scales: routing scales of DashAttention; the first and the third one are of all parts.
        code_lengths: tokens of a sequence of code, by part of the language models.
        sequences: held-out sequences of code.
        megabytes: of code for training.
        processes: that tokenise.
    """

    tasks: Training
    language: Training
    chunk_size: int
    first_steps: int
    first_tokens: int
    copies: int
    copied: int
    first_texts: int
    texts: dict[int, int]
    lengths: tuple[int, ...]
    samples: int
    budgets: tuple[int, ...]
    scales: tuple[float, ...]
    code_lengths: dict[str, int]
    sequences: int
    megabytes: float
    processes: int

    @property
    def steps_before_texts(self) -> int:
        """Steps of a task's training before the first of `texts`."""
        return 2 * self.first_steps

    @property
    def task_steps(self) -> int:
        """Steps of a task's whole training."""
        return self.steps_before_texts + len(self.texts) * self.tasks.steps

    @property
    def trained_length(self) -> int:
        """Tokens of the longest text of a task in training."""
        return max(self.texts)


SIZES = {
    "gpu": Size(
        tasks=Training(
            model=Shape(layers=4, hidden=256, ffn=768, heads=4, kv_heads=2, head_dim=64).section(),
            tokens=65536,
            steps=150,
            lr=1e-3,
        ),
        language=Training(
            model=Shape(layers=8, hidden=512, ffn=1536, heads=4, kv_heads=2, head_dim=128).section(),
            tokens=65536,
            steps=600,
            lr=1e-3,
        ),
        chunk_size=64,
        first_steps=600,
        first_tokens=8192,
        copies=32768,
        copied=128,
        first_texts=65536,
        texts={256: 8192, 512: 4096, 1024: 2048, 2048: 1024, 4096: 1024, 8192: 1024},
        lengths=(1024, 8192, 16384, 32768, 65536),
        samples=16,
        budgets=(4, 8, 16, 32),
        scales=(1.0, 2.0, 4.0, 8.0),
        code_lengths={"code-8k": 8192, "code-32k": 32768},
        sequences=32,
        megabytes=60,
        processes=8,
    ),
    "cpu": Size(
        tasks=Training(
            model=Shape(layers=2, hidden=32, ffn=64, heads=4, kv_heads=2, head_dim=16).section(),
            tokens=512,
            steps=4,
            lr=2e-3,
        ),
        language=Training(
            model=Shape(layers=2, hidden=32, ffn=64, heads=4, kv_heads=2, head_dim=16).section(),
            tokens=1024,
            steps=3,
            lr=2e-3,
        ),
        chunk_size=32,
        first_steps=2,
        first_tokens=512,
        copies=16,
        copied=64,
        first_texts=32,
        texts={256: 8, 512: 8},
        lengths=(512, 768),
        samples=2,
        budgets=(4, 6),
        scales=(1.0, 2.0, 4.0),
        code_lengths={"code-8k": 512, "code-32k": 1024},
        sequences=2,
        megabytes=0.2,
        processes=1,
    ),
}
