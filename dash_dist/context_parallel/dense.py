"""Dense attention by the stages and exchanges of DashAttention.

With a routing scale of 0 every earlier chunk has the same prior, its bias (log P - mean log P) / prior_sigma is 0, and
every chunk is selected: softmax attention to all earlier tokens, whose priors pass no gradient on. Knows this limit and
torch's own kernels for one device; does not know layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_kernels import AttentionSpec, ChunkGrid

_PRIOR_SIGMA = 1e6
"""Divides the rounding error of the mean of log P."""
_LEAST_DOCUMENT = 2048
"""Tokens of a document, on average, from which a call of torch for each costs less than the stages, which take all
documents at once."""
_OF_DOCUMENTS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, which prepares itself anew for every length."""


def dense_spec(*, chunk_size: int, softmax_scale: float | None = None) -> AttentionSpec:
    """Constants by which DashAttention is dense attention."""
    return AttentionSpec(
        chunk_size=chunk_size, routing_scale=0.0, prior_sigma=_PRIOR_SIGMA, softmax_scale=softmax_scale
    )


def has_torch_kernels(documents: ChunkGrid | None) -> bool:
    """Return whether `dense_attention_one_device` is the fast way for these documents; None is one sequence."""
    return documents is None or documents.tokens >= _LEAST_DOCUMENT * len(documents.document_lengths())


def dense_attention_one_device(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    spec: AttentionSpec,
    documents: ChunkGrid | None = None,
) -> torch.Tensor:
    """Causal softmax attention of q [B, T, Hq, D], k and v [B, T, Hkv, D]; the gradient of summary_query is zeros.

    Args:
        documents: of the one sequence; attention stays within each.
    """
    if documents is None:
        out = _causal(q, k, v, spec=spec)
    else:
        lengths = documents.document_lengths()
        parts = zip(q.split(lengths, dim=1), k.split(lengths, dim=1), v.split(lengths, dim=1), strict=True)
        with sdpa_kernel(_OF_DOCUMENTS):
            outputs = [_causal(*document, spec=spec) for document in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return with_zero_gradient(out, summary_query)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, spec: AttentionSpec) -> torch.Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=spec.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


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
