"""Rotary frequencies of each type of positions, in float64.

Knows the formulas, which are those of transformers' `modeling_rope_utils`; does not know ranks or layouts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dash_dist.config.positions import PositionsConfig


def rotary_frequencies(
    head_dim: int,
    base: float,
    positions: PositionsConfig,
    *,
    sequence_length: int,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the frequency of each pair of channels, [head_dim / 2] float64, in radians per token.

    Args:
        head_dim: channels of one head, all of them rotated.
        base: `model.rotary_base`.
        sequence_length: tokens of a whole sequence, which choose between longrope's two lists of factors.
    """
    if positions.type == "dynamic":
        base = frozen_base(head_dim, base, positions)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = base**-exponents
    match positions.type:
        case "linear":
            return frequencies / _set(positions.factor)
        case "llama3":
            return _llama3(frequencies, positions)
        case "yarn":
            return _yarn(frequencies, head_dim, base, positions)
        case "longrope":
            long = sequence_length > _set(positions.original_max_positions)
            factors = positions.long_factor if long else positions.short_factor
            return frequencies / torch.tensor(factors, dtype=torch.float64, device=device)
    return frequencies


def frozen_base(head_dim: int, base: float, positions: PositionsConfig) -> float:
    """Return the base by which default positions equal those of type dynamic at `positions.length` tokens."""
    factor, original = _set(positions.factor), _set(positions.original_max_positions)
    length = max(_set(positions.length), original)
    return base * (factor * length / original - (factor - 1)) ** (head_dim / (head_dim - 2))


def _llama3(frequencies: torch.Tensor, positions: PositionsConfig) -> torch.Tensor:
    factor, original = _set(positions.factor), _set(positions.original_max_positions)
    low, high = _set(positions.low_freq_factor), _set(positions.high_freq_factor)
    turns = original * frequencies / (2 * math.pi)  # over the original length
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _yarn(frequencies: torch.Tensor, head_dim: int, base: float, positions: PositionsConfig) -> torch.Tensor:
    original = _set(positions.original_max_positions)

    def channel_of(turns: float) -> float:
        """The pair of channels that turns so often over the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel_of(positions.beta_fast or 32.0), channel_of(positions.beta_slow or 1.0)
    if positions.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device=frequencies.device)
    interpolated = ((pairs - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (1 - interpolated) + frequencies / _set(positions.factor) * interpolated


def _set(value: Any) -> Any:
    assert value is not None, "PositionsConfig has checked the parameters of its type"
    return value
