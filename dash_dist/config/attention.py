"""The section `attention:`, the settings of DashAttention and of its exchange between ranks.

Knows the allowed values; does not know devices.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dash_dist.config.section import Section


class RoutingWarmup(Section):
    """A geometric change of the routing scale in the first steps of a run or a stage, from `start` to
    attention.routing_scale.
    """

    start: float = Field(gt=0.0, description="scale of the first step; larger than attention.routing_scale is sparser")
    steps: int = Field(gt=0, description="steps that have another scale than attention.routing_scale")
    begins_after: int = Field(
        default=0, ge=0, description="steps of the run before it; a stage that sets routing_warmup sets its own first"
    )


class AttentionConfig(Section):
    """Settings of `dash_dist.DashAttention`, or of dense attention with the same exchange."""

    kind: Literal["dash", "dense"] = Field(
        default="dash", description="dense: exact softmax attention to every earlier token, without routing"
    )
    chunk_size: int = Field(default=64, ge=16, le=128, multiple_of=16, description="tokens")
    alpha: float = Field(default=1.5, gt=1.0, le=2.0)
    routing_scale: float = Field(default=1.0, gt=0.0)
    routing_warmup: RoutingWarmup | None = None
    conversion: Literal["output"] | None = Field(
        default=None,
        description="output: layers stay dense, and summary_query learns to give each one's output by routing",
    )
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

    def routing_scale_at(self, step: int) -> float:
        """Return the routing scale of step `step`; the first step of a run is 1."""
        warmup = self.routing_warmup
        if warmup is None or step > warmup.begins_after + warmup.steps:
            return self.routing_scale
        share = max(step - 1 - warmup.begins_after, 0) / warmup.steps
        return float(warmup.start ** (1 - share) * self.routing_scale**share)

    @model_validator(mode="after")
    def _dense_has_no_routing(self) -> Self:
        for name in ("routing_warmup", "conversion"):
            if getattr(self, name) is not None and self.kind == "dense":
                raise ValueError(
                    f"attention.{name} is given, and attention.kind dense has no routing: drop it or set "
                    "attention.kind to dash"
                )
        return self


PIECES_PER_RANK = {"zigzag": 2, "double_zigzag": 4, "contiguous": 1}
"""Pieces of the sequence that one context-parallel rank holds, by layout."""
