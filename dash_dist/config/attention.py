"""The section `attention:`, the settings of DashAttention and of its exchange between ranks.

Knows the allowed values; does not know devices.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dash_dist.config.section import Section, divisors, next_multiple
from dash_dist.config.selection import FIXED_KINDS, InfLLMv2Config, NSAConfig, top_density

Kind = Literal["dash", "dense", "window", "topk", "infllmv2", "nsa"]


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
    """Kind of attention of each layer, settings of DashAttention, and the exchange of K and V between ranks."""

    kind: Kind | Annotated[tuple[Kind, ...], Field(min_length=1)] = Field(
        default="dash",
        description=(
            "of all layers, or a list of as many as there are layers, or a shorter one that repeats. dense: exact "
            "softmax attention to every earlier token; window: to the last `window` tokens; both without routing; "
            "topk: to the `top_chunks` chunks of the highest routing probability, without gradient through the "
            "selection; infllmv2: likewise, by pooled means of keys; nsa: likewise, by learned compressed keys, beside "
            "a compressed and a window branch"
        ),
    )
    window: int | None = Field(
        default=None, gt=0, description="tokens that a token of a window layer attends to, itself counted"
    )
    top_chunks: int | None = Field(
        default=None,
        ge=2,
        description="chunks that a token of a topk, infllmv2 or nsa layer attends to, its own counted",
    )
    infllmv2: InfLLMv2Config | None = Field(
        default=None, description="of layers of that kind; None: its defaults, which need top_chunks of 34 or more"
    )
    nsa: NSAConfig | None = Field(default=None, description="of layers of that kind; None: its defaults")
    chunk_size: int = Field(default=64, ge=16, le=128, multiple_of=16, description="tokens")
    alpha: float = Field(default=1.5, gt=1.0, le=2.0)
    routing_scale: float = Field(default=1.0, gt=0.0)
    routing_warmup: RoutingWarmup | None = None
    conversion: Literal["output"] | None = Field(
        default=None,
        description="output: layers stay dense, and summary_query learns to give each one's output by routing",
    )
    prior_sigma: float | None = Field(default=None, gt=0.0)
    attend_first_chunk: bool = Field(
        default=False,
        description=(
            "of dash layers: every token attends to the first chunk of its document as to its own. Routing selects "
            "among the others. For pretrained models, whose first tokens are an attention sink"
        ),
    )
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

    @model_validator(mode="after")
    def _window_has_a_size(self) -> Self:
        if "window" in self.pattern and self.window is None:
            raise ValueError("attention.kind has window layers, and attention.window is not set: give it in tokens")
        if "window" not in self.pattern and self.window is not None:
            raise ValueError(
                f"attention.window is {self.window}, and attention.kind has no window layer: drop it, or name window "
                "layers in attention.kind"
            )
        return self

    @model_validator(mode="after")
    def _fixed_kinds_have_a_count(self) -> Self:
        fixed = [kind for kind in self.pattern if kind in FIXED_KINDS]
        if fixed and self.top_chunks is None:
            raise ValueError(
                f"attention.kind has {fixed[0]} layers, and attention.top_chunks is not set: give it in chunks"
            )
        if not fixed and self.top_chunks is not None:
            raise ValueError(
                f"attention.top_chunks is {self.top_chunks}, and attention.kind has no layer of kind "
                f"{' or '.join(FIXED_KINDS)}: drop it, or name such layers in attention.kind"
            )
        return self

    @model_validator(mode="after")
    def _infllmv2_fits(self) -> Self:
        if "infllmv2" not in self.pattern:
            if self.infllmv2 is not None:
                raise ValueError(
                    "attention.infllmv2 is given, and attention.kind has no infllmv2 layer: drop it, or name such "
                    "layers"
                )
            return self
        rule = self.infllmv2_rule
        assert self.top_chunks is not None  # checked above
        if self.top_chunks < rule.always:
            raise ValueError(
                f"attention.top_chunks is {self.top_chunks}, and attention.infllmv2 always selects {rule.always} "
                f"chunks: raise top_chunks to {rule.always + 1}, or lower infllmv2.local_chunks, "
                f"{rule.local_chunks}"
            )
        if rule.dense_length % self.chunk_size:
            raise ValueError(
                f"attention.infllmv2.dense_length {rule.dense_length} is not a multiple of attention.chunk_size "
                f"{self.chunk_size}: set it to {next_multiple(rule.dense_length, self.chunk_size)}"
            )
        return self

    @model_validator(mode="after")
    def _nsa_fits(self) -> Self:
        if "nsa" not in self.pattern:
            if self.nsa is not None:
                raise ValueError(
                    "attention.nsa is given, and attention.kind has no nsa layer: drop it, or name such layers"
                )
            return self
        rule = self.nsa_rule
        assert self.top_chunks is not None  # checked above
        if self.top_chunks < rule.always:
            raise ValueError(
                f"attention.top_chunks is {self.top_chunks}, and attention.nsa always selects {rule.always} chunks: "
                f"raise top_chunks to {rule.always + 1}, or lower nsa.local_chunks, {rule.local_chunks}"
            )
        return self

    @property
    def nsa_rule(self) -> NSAConfig:
        """Settings of nsa layers."""
        return self.nsa or NSAConfig()

    @property
    def infllmv2_rule(self) -> InfLLMv2Config:
        """Settings of infllmv2 layers."""
        return self.infllmv2 or InfLLMv2Config()

    def fixed_density(self, kind: Kind, document_length: float) -> float:
        """Return the density of layers of a kind that fixes it, in documents of so many tokens."""
        assert kind in FIXED_KINDS
        assert self.top_chunks is not None  # checked above
        if kind == "infllmv2" and document_length <= self.infllmv2_rule.dense_length:
            return 1.0
        return top_density(self.top_chunks, document_length, self.chunk_size)

    @property
    def pattern(self) -> tuple[Kind, ...]:
        """The shortest list of kinds that gives `kind` by repetition."""
        given: tuple[Kind, ...] = (self.kind,) if isinstance(self.kind, str) else self.kind
        lengths = (length for length in range(1, len(given) + 1) if len(given) % length == 0)
        return next(given[:length] for length in lengths if given[:length] * (len(given) // length) == given)

    def kinds(self, num_layers: int) -> tuple[Kind, ...]:
        """Return the kind of each layer of the model. Raises ValueError if the list does not fit."""
        length = 1 if isinstance(self.kind, str) else len(self.kind)
        if num_layers % length:
            raise ValueError(
                f"attention.kind has {length} entries, and model.num_layers is {num_layers}: give one for each layer, "
                f"or a pattern of a length that divides it: {', '.join(map(str, divisors(num_layers)))}"
            )
        return self.pattern * (num_layers // len(self.pattern))

    def routing_scale_at(self, step: int) -> float:
        """Return the routing scale of step `step`; the first step of a run is 1."""
        warmup = self.routing_warmup
        if warmup is None or step > warmup.begins_after + warmup.steps:
            return self.routing_scale
        share = max(step - 1 - warmup.begins_after, 0) / warmup.steps
        return float(warmup.start ** (1 - share) * self.routing_scale**share)

    @model_validator(mode="after")
    def _dense_has_no_routing(self) -> Self:
        for name in ("routing_warmup", "conversion", "attend_first_chunk"):
            if getattr(self, name) and "dash" not in self.pattern:
                raise ValueError(
                    f"attention.{name} is given, and attention.kind {self.kind} has no routing: drop it or set "
                    "attention.kind to dash"
                )
        return self


PIECES_PER_RANK = {"zigzag": 2, "double_zigzag": 4, "contiguous": 1}
"""Pieces of the sequence that one context-parallel rank holds, by layout."""
