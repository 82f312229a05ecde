"""DeepSpeed in a process whose ranks and groups are already there.

Knows what DeepSpeed takes from the environment and from its caller. Does not know models.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch.distributed as dist

from dash_dist.megatron.parallel import ParallelDims


class ParallelUnit:
    """Interface that DeepSpeed expects of its "model parallel unit" (mpu).

    ZeRO shards over, and averages over, what DeepSpeed calls data parallelism: here all ranks that hold the same
    weights, over data and context parallelism together. DeepSpeed's own sequence parallelism is not used.
    """

    def __init__(self, dims: ParallelDims) -> None:
        self._dims = dims

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dims.dp_cp_group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._dims.dp_cp_group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._dims.dp_cp_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._dims.model_parallel_group

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())


def start_deepspeed(dims: ParallelDims) -> ModuleType:
    """Import DeepSpeed, let it use the process group that is there, and return the module `deepspeed`.

    Raises:
        ValueError: DeepSpeed was told (DS_ACCELERATOR) to use another kind of device than this rank's.
    """
    if dims.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed wants it, though it is told its device below; not every launcher sets it.
    os.environ.setdefault("LOCAL_RANK", str(dims.device.index or 0))
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    kind = get_accelerator().device_name()
    if kind != dims.device.type:
        raise ValueError(
            f"DeepSpeed would use {kind} (DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', '')}), and rank {dims.rank} "
            f"is on {dims.device}: set DS_ACCELERATOR to {dims.device.type}"
        )
    # Its shared-memory collectives for CPUs would be compiled here (half a minute), and wait for a dead peer for ever;
    # gloo, which every other collective of the run uses, does not.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend=dims.backend, dist_init_required=False, verbose=False)
    return deepspeed
