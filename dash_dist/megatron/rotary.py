"""Rotary positions of the tokens that one context-parallel rank holds.

Knows the layout of the sequence over the ranks. Does not know attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from dash_dist.config.positions import PositionsConfig
from dash_dist.context_parallel import shard_positions
from dash_dist.megatron.documents import PackedDocuments
from dash_dist.models.frequencies import rotary_frequencies


class ShardRotaryEmbedding(RotaryEmbedding):
    """Megatron-core's rotary embedding at the positions of this rank's shard, whatever the layout; for packed documents
    at the positions within each.

    Angles are computed in float64 and reduced to one turn before they are rounded to float32: at a million tokens the
    float32 product of position and frequency is off by up to 0.03 radians. All layers share their cosines and sines.

    Args:
        head_dim: channels of one head, all of them rotated.
        rotary_base: the slowest pair of channels turns once in 2 pi x rotary_base ** (1 - 2 / head_dim) tokens.
        positions: scaling of the frequencies, and the factor of rotated queries and keys.
        with_unscaled: give the angles of default positions as well, as a second kind.
        sequence_length: tokens of a whole sequence of the run.
        layout: as for `shard_positions`.
        cp_rank, cp_size: this rank's place in the context-parallel group.
        device: where the angles are kept.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        rotary_base: float,
        positions: PositionsConfig,
        with_unscaled: bool,
        sequence_length: int,
        layout: str,
        cp_rank: int,
        cp_size: int,
        device: torch.device,
    ) -> None:
        torch.nn.Module.__init__(self)
        scalings = [positions, PositionsConfig()] if with_unscaled else [positions]
        self.inv_freq = torch.stack(  # [1 or 2, head_dim / 2], radians per token
            [
                rotary_frequencies(head_dim, rotary_base, one, sequence_length=sequence_length, device=device)
                for one in scalings
            ]
        )
        self.layout = layout
        self.cp_rank = cp_rank
        self.cp_size = cp_size
        # A factor on cosines and sines is one on what they rotate.
        factors = [one.resolved_attention_factor for one in scalings]
        self._factors = torch.tensor(factors, dtype=torch.float64, device=device)[:, None, None]
        self._angles: tuple[int, torch.Tensor] | None = None

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedDocuments | None = None,
    ) -> int | torch.Tensor:
        """Return the argument of `forward`: packed documents' positions, or the tokens of the whole sequence."""
        if packed_seq_params is not None:
            return packed_seq_params.positions
        return super().get_rotary_seq_len(inference_context, transformer, transformer_input, transformer_config)

    def forward(self, sequence: int | torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Cosines and sines of the angles of this rank's tokens, in shard order.

        Args:
            sequence: tokens of the whole sequence (T), or the position of each of this rank's tokens, [T / cp].
                GPTModel passes more, about packed sequences, not read here.

        Returns:
            [2, 1, T / cp, head_dim / 2] float32: cosines, then sines; [2, 2, ...] with the unscaled ones
        """
        if isinstance(sequence, torch.Tensor):
            return self._angles_at(sequence)
        if self._angles is None or self._angles[0] != sequence:
            positions = shard_positions(sequence, self.cp_rank, self.cp_size, self.layout)
            self._angles = (sequence, self._angles_at(positions))
        return self._angles[1]

    def _angles_at(self, positions: torch.Tensor) -> torch.Tensor:
        angles = positions.to(self.inv_freq)[:, None] * self.inv_freq[:, None]  # [1 or 2, T / cp, head_dim / 2]
        angles = angles.remainder_(2 * math.pi).float()
        return torch.stack([(angles.cos() * self._factors).float(), (angles.sin() * self._factors).float()])
