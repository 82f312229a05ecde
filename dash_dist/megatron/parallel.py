"""The one owner of ranks and process groups.

Knows the process group and Megatron-core's parallel state. Does not know models or batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from dash_dist.config.parallel import ParallelConfig
from dash_dist.distributed.process_group import choose_device, join_from_environment
from dash_dist.megatron.cpu import run_megatron_on_cpu


@dataclass(frozen=True)
class ParallelDims:
    """Sizes, ranks and groups of tensor (tp), context (cp), pipeline (pp) and data (dp) parallelism.

    Made by `ParallelDims.initialise`; one per process at a time, since Megatron-core keeps its groups
    globally. Neighbouring ranks differ in tp first, then cp, dp and pp.
    """

    device: torch.device
    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    cp_size: int
    cp_rank: int
    pp_size: int
    pp_rank: int
    dp_size: int
    dp_rank: int
    owns_process_group: bool

    @classmethod
    def initialise(cls, parallel: ParallelConfig, *, timeout: timedelta) -> ParallelDims:
        """Join the run's process group, build Megatron-core's groups in it, and choose this process's device.

        An initialised `torch.distributed` is used as it is. Otherwise the environment describes the group
        (`distributed/process_group.py`).

        Args:
            timeout: after which a collective that some rank never joins fails.

        Raises:
            ValueError: the world size is not a multiple of tensor x pipeline x context.
            RuntimeError: the groups of an earlier `ParallelDims` were not closed.
        """
        if parallel_state.model_parallel_is_initialized():
            raise RuntimeError("Megatron-core's groups exist already in this process: close() the earlier ParallelDims")
        run_megatron_on_cpu()
        device = choose_device()
        owns_process_group = not dist.is_initialized()
        if owns_process_group:
            join_from_environment(device, timeout=timeout)
        try:
            dp_size = parallel.data_parallel_size(dist.get_world_size())
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor,
                pipeline_model_parallel_size=parallel.pipeline,
                context_parallel_size=parallel.context,
                distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
                create_gloo_process_groups=False,  # they serve Megatron-core's own checkpoints alone
            )
        except ValueError:
            if owns_process_group:
                dist.destroy_process_group()
            raise
        # Megatron-core forks its random states in places; nothing here draws from them (no dropout, weights
        # are drawn per parameter), so any seed will do.
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        return cls(
            device=device,
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            tp_size=parallel.tensor,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            cp_size=parallel.context,
            cp_rank=parallel_state.get_context_parallel_rank(),
            pp_size=parallel.pipeline,
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_size=dp_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            owns_process_group=owns_process_group,
        )

    @property
    def backend(self) -> str:
        """The process group's backend: nccl or gloo."""
        return str(dist.get_backend())

    @property
    def is_first_stage(self) -> bool:
        """True at ranks that hold the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True at ranks that hold the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same weights: gradients are summed over them."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the weights between them, over tensor and pipeline parallelism."""
        return parallel_state.get_model_parallel_group()

    def describe(self) -> str:
        """The layout in one line, for logs."""
        return (
            f"{self.world_size} x {self.device.type} over {self.backend}: "
            f"tp {self.tp_size} x cp {self.cp_size} x pp {self.pp_size} x dp {self.dp_size}"
        )

    def disband(self) -> None:
        """Destroy Megatron-core's groups, which hold memory and connections until then. Every rank calls it, when no
        collective is under way; `close` comes after it."""
        for group in parallel_state._global_process_group_list or []:
            if group is not None:  # the default group
                dist.destroy_process_group(group)

    def close(self) -> None:
        """Leave Megatron-core's groups, and the process group if `initialise` started it."""
        parallel_state.destroy_model_parallel()
        if self.owns_process_group:
            dist.destroy_process_group()
