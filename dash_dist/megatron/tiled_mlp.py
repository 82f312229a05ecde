"""Tiled MLP: the MLP of a layer a piece of the sequence at a time, computed again in the backward pass.

Knows the halves of Megatron-core's layer; does not know norms, kinds of MLP nor optimizers.

Everything after the attention of a layer is a function of each token alone: norms, MLP and residual addition. Computed
in pieces, it takes the memory of one piece, and only the residual stream between attention and MLP is kept for the
backward pass. The method is that of TiledMLP in Arctic Long Sequence Training (https://arxiv.org/abs/2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.autograd.function import once_differentiable

from dash_dist.megatron.layer_config import LayerConfig
from dash_dist.megatron.unread import is_recomputation, unread

_OF_ATTENTION = ("input_layernorm.", "self_attention.", "post_attention_layernorm.")
"""Modules of a layer that the half after the attention does not use."""

Half = Callable[[torch.Tensor], torch.Tensor]
"""The half of a layer from the residual stream after its attention to its output, [s, b, hidden] each."""


class TiledLayer(TransformerLayer):
    """A layer whose MLP works on `mlp_tile_tokens` of a rank's tokens at a time, or on all of them.

    Arguments beside the hidden states are not passed on: no run has inference contexts or padding masks, and only
    mixtures of experts read packed documents.
    """

    config: LayerConfig

    def _forward_mlp(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        half: Half = super()._forward_mlp
        rows = self.rows_of_tile(hidden_states)
        if rows is None:
            return half(hidden_states)
        if not torch.is_grad_enabled():
            return _forward(half, rows, hidden_states)
        # A layer that is recomputed is run for its gradients alone, and its output is its last value.
        recomputed = is_recomputation()
        # The attention's own weights get their gradients elsewhere, and None from here would reach their hooks.
        trained = [
            parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith(_OF_ATTENTION)
        ]
        output: torch.Tensor = _TiledHalf.apply(half, rows, recomputed, hidden_states, *trained)
        return output

    def rows_of_tile(self, hidden_states: torch.Tensor) -> int | None:
        """Return the first dimension of a tile of [s, b, hidden]; None where one tile would be all of it.

        Where tensor-parallel ranks hold shards of the sequence, an MLP works on the tiles of all of them at once.
        """
        tokens, batch = hidden_states.shape[:2]
        tile = self.config.mlp_tile_tokens
        rows = tokens if tile is None else max(1, tile // (batch * self.config.sequence_shards))
        return rows if rows < tokens else None


class _TiledHalf(torch.autograd.Function):
    """The half in pieces, whose backward pass computes every piece again.

    Weight gradients are summed over the pieces in float32 and handed on once, so that whatever waits for a parameter's
    gradient is called once a micro-batch.
    """

    @staticmethod
    def forward(
        ctx: Any, half: Half, rows: int, recomputed: bool, hidden: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        ctx.half, ctx.rows, ctx.trained = half, rows, trained
        ctx.save_for_backward(hidden)
        if recomputed:
            return unread(hidden, hidden.shape)
        return _forward(half, rows, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        sums: list[torch.Tensor | None] = [None] * len(ctx.trained)
        for piece in _pieces(hidden, ctx.rows):
            of_hidden[piece] = _backward(ctx.half, hidden[piece], gradient[piece], ctx.trained, sums)
        of_trained = [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, ctx.trained, strict=True)
        ]
        return None, None, None, of_hidden, *of_trained


def _forward(half: Half, rows: int, hidden: torch.Tensor) -> torch.Tensor:
    """Compute the half without gradients, piece by piece."""
    output = torch.empty_like(hidden)
    with torch.no_grad():
        for piece in _pieces(hidden, rows):
            output[piece] = half(hidden[piece].detach())
    return output


def _backward(
    half: Half,
    hidden: torch.Tensor,
    gradient: torch.Tensor,
    trained: tuple[torch.Tensor, ...],
    sums: list[torch.Tensor | None],
) -> torch.Tensor:
    """Return the gradient of a piece's input, and add those of `trained` to `sums`."""
    own = hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = half(own)
    of_hidden, *found = torch.autograd.grad(output, (own, *trained), gradient, allow_unused=True)
    for index, one in enumerate(found):
        before = sums[index]
        if before is not None:
            before += one
        elif one is not None:
            sums[index] = one.to(torch.float32, copy=True)
    return of_hidden


def _pieces(hidden: torch.Tensor, rows: int) -> Iterator[slice]:
    return (slice(first, first + rows) for first in range(0, hidden.shape[0], rows))
