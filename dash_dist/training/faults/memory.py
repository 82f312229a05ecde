"""Memory of a rank: a warning before the first step, and the message where the device has no more.

Knows the plan's prediction and the allocator's figures; does not know who allocates.
"""

import gc
import os

import torch

from dash_dist.config.run import RunConfig
from dash_dist.engine.ranks import Dims
from dash_dist.megatron.host_memory import available_host_bytes
from dash_dist.planning.advice import smallest_change
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import GPUS, Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.prediction import predict

_GIB = 2**30
_OTHER_REMEDIES = (
    "set parallel.recompute, parallel.mlp_tile_tokens and parallel.offload_activations, or use more ranks or a "
    "shorter training.sequence_length"
)


class MemoryPlan:
    """The predicted memory of a run's ranks beside that of their devices.

    Args:
        vocab_size: tokens of the embedding.
        machine: of the run.

    Raises:
        ValueError: the configuration cannot run on so many ranks.
    """

    def __init__(self, config: RunConfig, machine: Machine, *, vocab_size: int) -> None:
        self._config, self._machine, self._vocab_size = config, machine, vocab_size
        self._layout = Layout.of(config, machine.gpus)
        self._predicted = predict(config, self._layout, machine, Assumptions(), vocab_size=vocab_size)
        self._peak = self._predicted.peak

    def warning(self) -> str | None:
        """Return a warning if the prediction is near what a device has, or above what it or the host has."""
        ranks = self._machine.gpus_per_node
        on_host, available = self._peak.host * ranks, available_host_bytes()
        if on_host > available:
            return (
                f"host memory is short: the plan predicts {on_host / _GIB:.1f} GiB for the {ranks} "
                f"ranks of a node, and {available / _GIB:.1f} GiB are available; lower parallel.offload_activations or "
                "optimizer.offload_moments"
            )
        total, has = self._peak.total, self._machine.memory
        if not self._predicted.is_tight:
            return None
        return (
            f"memory is tight: the plan predicts {total / _GIB:.1f} GiB at the fullest rank, in the "
            f"{self._peak.moment}, and a device has {has / _GIB:.1f} GiB; {self.remedy()}"
        )

    def beside(self, *, kept: float, peak: float) -> str:
        """Return predicted and measured memory by kind.

        Args:
            kept: bytes that are allocated between steps.
            peak: most bytes that were allocated.
        """
        plan = self._peak
        planned = plan.weights + plan.gradients + plan.optimizer
        moving = plan.activations + plan.attention + plan.communication
        return (
            f"weights, gradients and optimizer: {planned / _GIB:.1f} GiB planned, {kept / _GIB:.1f} GiB measured; "
            f"activations and work space: {moving / _GIB:.1f} GiB planned, {max(0.0, peak - kept) / _GIB:.1f} GiB "
            f"measured; the plan's total is {plan.total / _GIB:.1f} GiB, in the {plan.moment}"
        )

    def remedy(self) -> str:
        """Return the change of settings to make."""
        change = smallest_change(self._config, self._machine, Assumptions(), self._layout, vocab_size=self._vocab_size)
        return f"set {change}, the smallest change that fits by the plan" if change else _OTHER_REMEDIES


def plan_memory(config: RunConfig, dims: Dims, vocab_size: int) -> MemoryPlan | None:
    """Return the plan for this rank's device; None on a CPU, which predictions are not made for."""
    if dims.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(dims.device)
    gpu = next((gpu for part, gpu in GPUS.items() if part in name), GPUS["H100"])
    node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count()))
    memory = torch.cuda.get_device_properties(dims.device).total_memory
    machine = Machine(gpu, dims.world_size, min(node, dims.world_size), memory)
    return MemoryPlan(config, machine, vocab_size=vocab_size)


def free_memory() -> None:
    """Free what nobody refers to any more, and give the allocators' caches back to the device and to the host."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned blocks, which would count as used by the next stage


def allocated_bytes(device: torch.device) -> float:
    """Return the bytes that tensors have on a GPU; 0 on a CPU, where nobody counts them."""
    return float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0.0


def out_of_memory(plan: MemoryPlan | None, rank: int, step: int, error: BaseException, kept: float) -> str:
    """Return the message about an allocation that failed.

    Args:
        plan: of the rank's device; None without one.
        step: the last one that is done.
        kept: bytes that were allocated before the first step.
    """
    asked = str(error).strip().split("\n")[0].rstrip(".")
    told = f"rank {rank} is out of memory in step {step + 1}: {asked}"
    if plan is None:
        return f"{told}; {_OTHER_REMEDIES}"
    return f"{told}; {plan.beside(kept=kept, peak=torch.cuda.max_memory_allocated())}; {plan.remedy()}"
