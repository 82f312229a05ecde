"""Texts of the conversion: code of the installed packages, and questions about a fact in a long text.

Knows files and tokens; does not know models.
"""

from __future__ import annotations

import site
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_dist.data.tokenizer import Tokenizer
from dash_dist.evaluation.samples import Sample, make_sample

TASKS = ("single", "multi_key")
"""Tasks of the evaluation whose answer is one number."""
HELD_OUT = -1
"""Seed of batches from the end of the text, which no other seed gives."""
_SHARE_FOR_TRAINING = 0.9


def code(tokenizer: Tokenizer, mebibytes: float) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return tokens of the source code of the installed packages, file by file in the order of a fixed shuffle.

    Parts of one package are in training and held out: losses are compared with each other, not with those elsewhere.
    """
    files = sorted(path for folder in site.getsitepackages() for path in Path(folder).rglob("*.py"))
    np.random.default_rng(0).shuffle(files)
    texts, size = [], 0
    for path in files:
        texts.append(path.read_bytes())
        size += len(texts[-1])
        if size > mebibytes * 2**20:
            break
    encoded = tokenizer.encode_batch([text.decode("utf-8", errors="replace") for text in texts])
    return np.concatenate(encoded).astype(np.int32)


def check_windows(text: np.ndarray[Any, Any], length: int) -> None:
    """Refuse, with ValueError, a text whose held-out part is too short for `windows`."""
    heldout = len(text) - int(len(text) * _SHARE_FOR_TRAINING)
    if heldout <= length + 1:
        raise ValueError(f"{heldout} held-out tokens are too few for sequences of {length}: raise --mebibytes")


def windows(text: np.ndarray[Any, Any], *, seed: int, batch_size: int, length: int) -> Iterator[torch.Tensor]:
    """Yield [batch_size, length + 1] tokens from random places of the first nine tenths, or of the rest."""
    border = int(len(text) * _SHARE_FOR_TRAINING)
    low, high = (border, len(text)) if seed == HELD_OUT else (0, border)
    generator = np.random.default_rng(abs(seed))
    while True:
        starts = generator.integers(low, high - length - 1, batch_size)
        yield torch.from_numpy(np.stack([text[start : start + length + 1] for start in starts]).astype(np.int64))


def questions(tokenizer: Tokenizer, lengths: Iterable[int], samples: int) -> dict[str, list[Sample]]:
    """Return samples for each of `TASKS` and lengths, by names such as "single at 2048"."""
    return {
        f"{task} at {length}": [
            make_sample(task, tokenizer, length=length, index=index, seed=0) for index in range(samples)
        ]
        for length in lengths
        for task in TASKS
    }
