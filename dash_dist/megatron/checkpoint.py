"""Model, optimizer and step in Megatron-core's distributed checkpoint, loadable at another parallel layout.

Knows one checkpoint directory. Does not know which of a run's checkpoints to keep or to load.
"""

from __future__ import annotations

import queue
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from dash_dist.megatron.model import DashGPTModel
from dash_dist.megatron.optimizer import Optimizer
from dash_dist.megatron.parallel import ParallelDims

_RUN = "run"


@dataclass(frozen=True)
class EngineState:
    """What a checkpoint holds beside tensors.

    Attributes:
        step: steps done.
        identity: settings that must be the same for the weights and the optimizer's state to fit.
        function: settings of the function that the weights were trained in; others fit them too.
    """

    step: int
    identity: dict[str, Any]
    function: dict[str, Any]


def save_checkpoint(
    directory: Path, model: DashGPTModel, optimizer: Optimizer, dims: ParallelDims, run: EngineState
) -> None:
    """Write a checkpoint. A collective: all ranks call it. `metadata.json` is written last, when all else is there.

    Args:
        directory: on storage that all ranks share; created, and must be empty.
        run: rank 0's is kept.

    Raises:
        OSError: at every rank: the directory cannot be created, or is not empty.
    """
    _raise_at_every_rank(_create_directory(directory) if dims.rank == 0 else None, dims)
    state = _sharded_state(model, optimizer, dims, is_loading=False)
    if state["optimizer"].get("param_state") is None:
        # The distributed optimizer's state is gathered on one rank; the others' empty entry would look to
        # Megatron like a difference between the ranks.
        state["optimizer"].pop("param_state", None)
    state[_RUN] = asdict(run)
    if filesystem_async._results_queue is None:
        # By default the writer reports through a queue in a process of its own, for saves that go on in the
        # background. These do not, and that process would outlive a killed rank.
        filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(directory))
    dist.barrier()


def load_checkpoint(
    directory: Path, model: DashGPTModel, optimizer: Optimizer, dims: ParallelDims, identity: dict[str, Any]
) -> EngineState:
    """Load weights and optimizer state in place. A collective: all ranks call it.

    The checkpoint may come from another tensor-, context-, pipeline- and data-parallel size.

    Raises:
        FileNotFoundError: at every rank: there is no complete checkpoint in the directory.
        ValueError: at every rank: the checkpoint's identity is not `identity`; names what differs.
    """
    _raise_at_every_rank(_find_misfit(directory, identity) if dims.rank == 0 else None, dims)
    state = dist_checkpointing.load(_sharded_state(model, optimizer, dims, is_loading=True), str(directory))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    dist.barrier()
    return EngineState(**state[_RUN])


def _sharded_state(
    model: DashGPTModel, optimizer: Optimizer, dims: ParallelDims, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": dims.dp_cp_group,
        # The format in which every optimizer tensor has its weight's shape, so that any layout can load it.
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gather the shards on one rank of DP x CP rather than on all.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }
    model_state = model.sharded_state_dict(metadata=metadata)
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata, is_loading=is_loading),
    }


def _create_directory(directory: Path) -> OSError | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            return OSError(f"{directory} is not empty: save to a new directory")
    except OSError as error:
        return OSError(f"cannot create the checkpoint directory {directory}: {error}")
    return None


def _find_misfit(directory: Path, identity: dict[str, Any]) -> FileNotFoundError | ValueError | None:
    if not (directory / "metadata.json").is_file():
        return FileNotFoundError(f"{directory} has no metadata.json: it is not a checkpoint, or not written to its end")
    saved = dist_checkpointing.load_common_state_dict(str(directory))[_RUN]["identity"]
    differing = [
        f"{key} is {saved.get(key)!r} in the checkpoint and {identity.get(key)!r} in this run"
        for key in sorted(identity.keys() | saved.keys())
        if saved.get(key) != identity.get(key)
    ]
    return ValueError(f"{directory} does not fit this run: {'; '.join(differing)}") if differing else None


def _raise_at_every_rank(problem_of_rank_0: Exception | None, dims: ParallelDims) -> None:
    """Storage may look different to other ranks for a while: rank 0 decides for all."""
    problem = [problem_of_rank_0]
    dist.broadcast_object_list(problem, src=0, device=dims.device)
    if problem[0] is not None:
        raise problem[0]
