"""Weights, gradients and optimizer state of one rank, and what it sends for them in a step, by engine.

Knows which of them Megatron-core's distributed optimizer and DeepSpeed's ZeRO shard over the ranks that hold the same
weights. Does not know activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from dash_dist.config.deepspeed import ZeroSettings
from dash_dist.config.run import RunConfig
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.parameters import StageNumbers
from dash_dist.planning.traffic import BF16, FP32, Bytes, all_reduce


@dataclass(frozen=True)
class State:
    """Bytes that a rank keeps between the passes.

    Attributes:
        numbers: trained ones in this rank's optimizer state.
        weights: in bfloat16. At ZeRO stage 3 the rank's part, and whole ones that are gathered at a time.
        gradients: in float32, with the bucket in which DeepSpeed reduces them.
        optimizer: the float32 copy and two moments.
        update: more that comes and goes in the update.
    """

    numbers: int
    weights: int
    gradients: int
    optimizer: int
    update: int = 0


@dataclass(frozen=True)
class Sharding:
    """Rules by which an engine shards over the ranks that hold the same weights.

    Attributes:
        optimizer: float32 copies and moments are sharded.
        zero: DeepSpeed's settings; None for Megatron-core.
    """

    optimizer: bool
    zero: ZeroSettings | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Sharding:
        if config.engine == "deepspeed":
            return cls(optimizer=True, zero=config.deepspeed.settings().zero_optimization)
        return cls(optimizer=config.parallel.distributed_optimizer)

    @property
    def buffers(self) -> bool:
        """True where weights and gradients lie in the padded buffers of Megatron-core's distributed optimizer."""
        return self.optimizer and self.zero is None

    def state(self, numbers: StageNumbers, layout: Layout, *, largest_layer: int) -> State:
        """Return what a rank keeps of a stage with so many numbers.

        Args:
            largest_layer: numbers of the largest part that ZeRO stage 3 gathers at a time.
        """
        replicas = layout.weight_replicas
        own = numbers.trained // replicas if self.optimizer else numbers.trained
        weights, gradients, update = numbers.weights * BF16, numbers.trained * FP32, 0
        if self.zero is not None:
            if self.zero.stage >= 2:
                gradients = update = own * FP32  # the update takes a copy of the rank's gradients
            if self.zero.stage == 3:
                update = min(own, self.zero.sub_group_size) * FP32
                whole = max(largest_layer, self.zero.stage3_max_live_parameters or 0)
                weights = (numbers.weights // replicas + min(numbers.weights, whole)) * BF16
            gradients += min(self.zero.reduce_bucket_size, numbers.trained) * FP32
        return State(own, weights, gradients, 3 * own * FP32, update)

    def sent(self, trained: int, weights: int, layout: Layout, machine: Machine, *, micro_batches: int) -> Bytes:
        """Return the bytes that a rank sends in a step to sum gradients, and to gather weights.

        Args:
            trained: numbers whose gradients are summed.
            weights: numbers of the stage, frozen ones included.
        """

        def around(size: float) -> Bytes:
            return all_reduce(size, layout.weight_replicas, layout.tensor, machine)

        # A reduction that leaves each rank its part is half of an all-reduce, and so is gathering parts.
        stage = self.zero.stage if self.zero is not None else 0
        if stage == 0:
            gradients, gathered = around(trained * FP32), around(trained * BF16)
            return gradients * 0.5 + gathered * 0.5 if self.optimizer else gradients
        if stage == 1:
            return around(trained * FP32) + around(trained * BF16) * 0.5
        gradients = around(trained * FP32) * (0.5 * micro_batches)
        if stage == 2:
            return gradients + around(trained * BF16) * 0.5
        return gradients + around(weights * BF16) * (0.5 * 2 * micro_batches)  # in both passes
