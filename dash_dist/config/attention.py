"""The section `attention:`, the settings of DashAttention and of its exchange between ranks.

Knows the allowed values; does not know devices.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dash_dist.config.section import Section


class AttentionConfig(Section):
    """Settings of `dash_dist.DashAttention`, or of dense attention with the same exchange."""

    kind: Literal["dash", "dense"] = Field(
        default="dash", description="dense: exact softmax attention to every earlier token, without routing"
    )
    chunk_size: int = Field(default=64, ge=16, le=128, multiple_of=16, description="tokens")
    alpha: float = Field(default=1.5, gt=1.0, le=2.0)
    routing_scale: float = Field(default=1.0, gt=0.0)
    prior_sigma: float | None = Field(default=None, gt=0.0)
    backend: Literal["auto", "triton", "eager"] = "auto"
    layout: Literal["zigzag", "double_zigzag", "contiguous"] = Field(
        default="zigzag",
        description="chunks that a context-parallel rank holds; the curves cp/imbalance compare the layouts",
    )
    exchange: Literal["auto", "selective", "allgather", "ring"] = Field(
        default="auto", description="transport of K and V between context-parallel ranks; the result is the same"
    )
    ranks_per_node: int | None = Field(
        default=None,
        gt=0,
        description="consecutive context-parallel ranks with fast links between them; None: found by host name",
    )


PIECES_PER_RANK = {"zigzag": 2, "double_zigzag": 4, "contiguous": 1}
"""Pieces of the sequence that one context-parallel rank holds, by layout."""
