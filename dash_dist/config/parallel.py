"""The section `parallel:`, the distribution of the model over the ranks.

Knows sizes of groups; does not know process groups.
"""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from dash_dist.config.section import Section, next_multiple

RecomputeModule = Literal["projections", "mlp"]
RECOMPUTE_MODULES: tuple[RecomputeModule, ...] = get_args(RecomputeModule)


class ParallelConfig(Section):
    """Sizes of tensor, pipeline and context parallelism. The data-parallel size follows from the world size."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    context: int = Field(default=1, gt=0)
    distributed_optimizer: bool = Field(
        default=True, description="shard the optimizer's state over the data- and context-parallel ranks"
    )
    sequence_parallel: bool | None = Field(
        default=None,
        description="split the residual stream, norms and inputs of projections along the sequence over the "
        "tensor-parallel ranks; None: where tensor is above 1",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="selective: of each layer keep its input and what attention computed, whose kernels then run once, "
        "and recompute `recompute_modules` in the backward pass; full: keep the input and the routing alone",
    )
    recompute_modules: tuple[RecomputeModule, ...] | None = Field(
        default=None,
        description="parts of a layer that recompute: selective computes twice, by default both. projections: the "
        "norm, the projection to queries, keys and values, and the rotary embedding, a tenth to a quarter of the "
        "products; saves queries, keys and values. mlp: its norm and its first matrix, half of them; saves the most",
    )
    recompute_layers: int | None = Field(
        default=None,
        gt=0,
        description="layers of each pipeline stage that are recomputed, its first ones; the others keep everything; "
        "None: all",
    )
    overlap_gradients: bool = Field(
        default=False,
        description="sum the gradients of a layer over the ranks while those of the layers before it are computed",
    )
    fused_kernels: bool = Field(
        default=True, description="Liger's kernels for norms, SwiGLU and the loss on GPUs; false: PyTorch's operations"
    )
    fp8_linears: bool = Field(
        default=False,
        description="multiply in FP8 in the decoder's linears, forward and for the gradients of their inputs; the "
        "gradients of weights, attention and output layer stay in bfloat16. Needs GPUs with FP8, as Hopper",
    )
    offload_activations: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="share of the recomputed layers whose inputs wait in host memory; layers must be recomputed as a "
        "whole",
    )
    mlp_tile_tokens: int | None = Field(
        default=None,
        gt=0,
        description="tokens of a rank that each MLP works on at a time, in the backward pass again; None: all",
    )

    @model_validator(mode="after")
    def _sequence_is_split_over_ranks(self) -> Self:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "sequence_parallel is true and tensor is 1, which leaves no ranks to split over: set tensor to 2 or "
                "more, or sequence_parallel to null"
            )
        return self

    @model_validator(mode="after")
    def _modules_are_read(self) -> Self:
        modules = self.recompute_modules
        if modules is None:
            return self
        if self.recompute != "selective":
            raise ValueError(
                f"recompute_modules is {list(modules)} and recompute is {self.recompute}, which does not read it: set "
                "recompute to selective, or recompute_modules to null"
            )
        if not modules or len(set(modules)) < len(modules):
            raise ValueError(
                f"recompute_modules is {list(modules)}: name some of {', '.join(RECOMPUTE_MODULES)}, each once; to "
                "recompute nothing set recompute to none"
            )
        return self

    @model_validator(mode="after")
    def _layers_are_read(self) -> Self:
        if self.recompute_layers is not None and self.recompute == "none":
            raise ValueError(
                f"recompute_layers is {self.recompute_layers} and recompute is none, which does not read it: set "
                "recompute to selective or full, or recompute_layers to null"
            )
        return self

    @model_validator(mode="after")
    def _offload_finds_inputs(self) -> Self:
        if self.offload_activations and set(self.recomputed) != set(RECOMPUTE_MODULES):
            raise ValueError(
                f"offload_activations {self.offload_activations} moves the inputs of layers that are recomputed as a "
                f"whole, and recompute is {self.recompute} with recompute_modules {self.recompute_modules}: set "
                "recompute to full or selective and recompute_modules to null, or offload_activations to 0"
            )
        return self

    @property
    def recomputed(self) -> tuple[RecomputeModule, ...]:
        """Parts of a layer that the backward pass computes again; `full` adds the attention itself."""
        return () if self.recompute == "none" else self.recompute_modules or RECOMPUTE_MODULES

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks that the residual stream of a context-parallel rank is split over."""
        return 1 if self.sequence_parallel is False else self.tensor

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of ranks that read different sequences.

        Raises:
            ValueError: `world_size` is not a multiple of tensor x pipeline x context.
        """
        model_ranks = self.tensor * self.pipeline * self.context
        if world_size % model_ranks:
            raise ValueError(
                f"world size {world_size} is not a multiple of tensor x pipeline x context = {self.tensor} x "
                f"{self.pipeline} x {self.context} = {model_ranks}: start "
                f"{next_multiple(world_size, model_ranks)} processes or lower one of the three"
            )
        return world_size // model_ranks


def offloaded_layers(fraction: float, layers: int, *, first_stage: bool) -> range:
    """Return the layers of a pipeline stage, from 0, whose inputs wait on the host.

    The input of the last one starts the way back of those before it, and that of a later stage is kept by the pipeline:
    both stay.

    Args:
        fraction: `ParallelConfig.offload_activations`.
        layers: of the stage that are recomputed.
        first_stage: the stage begins with the embedding.
    """
    first = 0 if first_stage else 1
    return range(first, max(first, min(first + round(fraction * layers), layers - 1)))
