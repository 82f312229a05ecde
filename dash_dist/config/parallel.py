"""The section `parallel:`, the distribution of the model over the ranks.

Knows sizes of groups; does not know process groups.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dash_dist.config.section import Section, next_multiple


class ParallelConfig(Section):
    """Sizes of tensor, pipeline and context parallelism. The data-parallel size follows from the world size."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    context: int = Field(default=1, gt=0)
    distributed_optimizer: bool = Field(
        default=True, description="shard the optimizer's state over the data- and context-parallel ranks"
    )
    recompute: Literal["none", "full"] = Field(
        default="none",
        description="full: keep only the input of each layer and recompute the rest in the backward pass",
    )
    offload_activations: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="share of the layers whose inputs, which recompute: full keeps, wait in host memory",
    )
    mlp_tile_tokens: int | None = Field(
        default=None,
        gt=0,
        description="tokens of a rank that each MLP works on at a time, in the backward pass again; None: all",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload_activations and self.recompute != "full":
            raise ValueError(
                f"offload_activations {self.offload_activations} moves what recompute=full keeps, and recompute is "
                f"{self.recompute}: set recompute to full, or offload_activations to 0"
            )
        return self

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

    The last layer's backward pass comes first, and the input of a later stage is kept by the pipeline: both stay.

    Args:
        fraction: `ParallelConfig.offload_activations`.
        layers: of the stage.
        first_stage: the stage begins with the embedding.
    """
    first = 0 if first_stage else 1
    return range(first, max(first, min(first + round(fraction * layers), layers - 1)))
