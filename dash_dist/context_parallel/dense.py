"""Dense attention by the stages and exchanges of DashAttention.

With a routing scale of 0 every earlier chunk has the same prior, its bias (log P - mean log P) / prior_sigma is 0, and
every chunk is selected: softmax attention to all earlier tokens, whose priors pass no gradient on. Knows this limit and
torch's own kernels for one device; does not know layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dash_kernels import AttentionSpec

_PRIOR_SIGMA = 1e6
"""Divides the rounding error of the mean of log P."""


def dense_spec(*, chunk_size: int, softmax_scale: float | None = None) -> AttentionSpec:
    """Constants by which DashAttention is dense attention."""
    return AttentionSpec(
        chunk_size=chunk_size, routing_scale=0.0, prior_sigma=_PRIOR_SIGMA, softmax_scale=softmax_scale
    )


def dense_attention_one_device(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, summary_query: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Causal softmax attention of q [B, T, Hq, D], k and v [B, T, Hkv, D]; the gradient of summary_query is zeros."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=spec.softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return with_zero_gradient(out.transpose(1, 2), summary_query)


def with_zero_gradient(out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `out`, which does not depend on `weight`, and give `weight` a gradient of zeros.

    Every weight then has a gradient, as gradient buffers and ZeRO expect.
    """
    connected: torch.Tensor = _WithZeroGradient.apply(out, weight)
    return connected


class _WithZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (weight,) = ctx.saved_tensors
        return gradients[0], torch.zeros_like(weight)
