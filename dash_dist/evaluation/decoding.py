"""Greedy continuations of prompts, checked against a guess instead of written token by token.

Knows tokens; does not know texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dash_dist.engine.protocol import MOST_POSITIONS, Predictor


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of some prompts.

    Attributes:
        tokens: int64, one array per prompt.
        passes: forward passes that the slowest prompt took.
    """

    tokens: list[np.ndarray]
    passes: int


def continue_greedily(
    predictor: Predictor,
    prompts: Sequence[np.ndarray],
    guesses: Sequence[np.ndarray],
    *,
    sequence_length: int,
    padding: int,
    after_pass: Callable[[int], None] = lambda passes: None,
) -> Continuations:
    """Continue each prompt by its likeliest tokens, as many as its guess has. A collective: all ranks call it.

    One forward pass gives the likeliest token after every prefix of prompt and guess. Up to the first position where
    it is not the guess's, and including that one, these are the tokens of plain greedy decoding. They are kept, the
    other ones become the next guess, and so on (Jacobi decoding, Santilli et al. 2023, arXiv 2305.10427). A guess that
    is right takes one pass; one that is wrong takes at most as many as it has tokens.

    Args:
        guesses: 1 to `MOST_POSITIONS` tokens each.
        sequence_length: that of `predictor`; a prompt and its guess fit into it.
        padding: any token; fills the rows.
        after_pass: called with the number of passes so far; the first one is of all prompts.

    Raises:
        BatchError, ExchangeError: see `Predictor.next_tokens`.
    """
    too_long = [len(guess) for guess in guesses if not 1 <= len(guess) <= MOST_POSITIONS]
    assert not too_long, f"guesses of {too_long} tokens: give 1 to {MOST_POSITIONS}"
    known = [np.asarray(guess, dtype=np.int64) for guess in guesses]
    settled = [0] * len(known)
    passes = 0
    while unsettled := [one for one in range(len(known)) if settled[one] < len(known[one])]:
        rows = torch.full((len(unsettled), sequence_length), padding, dtype=torch.int64)
        positions = torch.zeros(len(unsettled), max(len(known[one]) for one in unsettled), dtype=torch.int64)
        for row, one in enumerate(unsettled):
            text = np.concatenate([prompts[one], known[one]])
            rows[row, : len(text)] = torch.from_numpy(text)
            asked = len(prompts[one]) - 1 + torch.arange(positions.shape[1])
            positions[row] = asked.clamp(max=len(text) - 2)
        found = predictor.next_tokens(rows, positions).numpy()
        passes += 1
        after_pass(passes)
        for row, one in enumerate(unsettled):
            likeliest, start = found[row, : len(known[one])], settled[one]
            differing = np.flatnonzero(likeliest[start:] != known[one][start:])
            settled[one] = start + int(differing[0]) + 1 if len(differing) else len(likeliest)
            known[one] = np.concatenate([known[one][:start], likeliest[start:]])
    return Continuations(known, passes)
