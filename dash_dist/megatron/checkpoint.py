"""Model, optimizer and step in Megatron-core's distributed checkpoint, loadable at another parallel layout.

Knows one checkpoint directory. Does not know which of a run's checkpoints to keep or to load, nor whether the files are
those that were written: who calls `load_checkpoint` has verified them (`dash_dist.checkpoints`).

Every rank writes what it has, and tensors that all ranks of DP x CP have are divided among them: no rank holds or waits
for the state of another. Megatron-core reads it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from dash_dist.checkpoints.background import FinishedCall, ForkedCall
from dash_dist.checkpoints.engine_state import LORA, RUN, EngineState, read_engine_state
from dash_dist.checkpoints.integrity import FileChecksum
from dash_dist.checkpoints.pickles import INDEX, read_index
from dash_dist.config.trainable import ADAPTERS
from dash_dist.distributed.agreement import Agreement
from dash_dist.garbage import no_garbage_collection
from dash_dist.megatron.host_copies import HostCopies, is_written_by_gpu
from dash_dist.megatron.model import DashGPTModel
from dash_dist.megatron.optimizer import Optimizer
from dash_dist.megatron.optimizer_state import load_state, state_to_save
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.write_plan import WritePlan, Written, first_copies, share_of

T = TypeVar("T")

_UPDATES = "updates"


class MegatronSave:
    """A checkpoint that is being written, at one rank: a `PendingSave`."""

    def __init__(self, plan: WritePlan, dims: ParallelDims, *, background: bool) -> None:
        self._dims = dims
        self._plan: WritePlan | None = plan  # keeps the host's copy of the tensors until it is written
        self._writing = ForkedCall(plan.write) if background else FinishedCall(plan.write)

    def done(self) -> bool:
        """Return whether this rank's writing has ended, with success or failure."""
        return self._writing.done()

    def finish(self) -> dict[str, FileChecksum]:
        """Wait for every rank's files, then complete the checkpoint. A collective: all ranks call it, once.

        Returns:
            Size and CRC-32 of the files that this rank wrote.

        Raises:
            OSError: at every rank: one of them could not write; names it.
        """
        plan, self._plan = self._plan, None
        assert plan is not None
        written, failure = Written([], {}), None
        try:
            written = self._writing.result()
        except OSError as error:
            failure = error
        outcomes: list[Any] | None = [None] * self._dims.world_size if self._dims.rank == 0 else None
        with no_garbage_collection():  # which would look through hundreds of thousands of objects time and again
            dist.gather_object((plan.items, written.results, failure), outcomes)
            Agreement().call_on_main(lambda: _complete(plan, outcomes or []))
        return written.checksums

    def abandon(self) -> None:
        """End this rank's writing."""
        self._writing.abandon()


def start_save(
    directory: Path,
    model: DashGPTModel,
    optimizer: Optimizer,
    dims: ParallelDims,
    run: EngineState,
    *,
    copies: HostCopies | None,
) -> MegatronSave:
    """Begin to write the state at the time of the call. A collective: all ranks call it.

    GPU tensors are copied to the host before this returns. What is in the host's memory then is written by a forked
    copy of the process, and not changed by what this one does. The ranks exchange nothing but the directory's fate.

    Args:
        directory: on storage that all ranks share; created, and must be empty.
        run: rank 0's is kept.
        copies: memory for the copies, in use until the result has finished; None: this rank has written when this
            returns.

    Raises:
        OSError: at every rank: the directory cannot be created, or is not empty.
        RankError: this rank's host has too little memory for the copies.
    """
    Agreement().call_on_main(lambda: create_directory(directory))
    common = {"optimizer": {_UPDATES: optimizer.updates}, RUN: asdict(run)} if dims.rank == 0 else None
    plan = WritePlan(directory, _tensors_to_write(model, optimizer, dims), common, copies)
    return MegatronSave(plan, dims, background=copies is not None)


def prepare_save(model: DashGPTModel, optimizer: Optimizer, dims: ParallelDims, copies: HostCopies) -> None:
    """Begin to allocate what `start_save` copies to; returns at once. Local."""
    tensors = [tensor.data for tensor in _tensors_to_write(model, optimizer, dims)]
    copies.prepare([tensor for tensor in tensors if is_written_by_gpu(tensor)])


def load_checkpoint(
    directory: Path, model: DashGPTModel, optimizer: Optimizer, dims: ParallelDims, identity: dict[str, Any]
) -> tuple[EngineState, int]:
    """Load weights and optimizer state in place. A collective: all ranks call it.

    The checkpoint may come from another tensor-, context-, pipeline- and data-parallel size. Parameters that were
    frozen in it start with a new optimizer state.

    Returns:
        The state that is not a tensor, and the number of parameters with a new optimizer state.

    Raises:
        FileNotFoundError: at every rank: there is no complete checkpoint in the directory.
        OSError: at every rank: the storage does not give it.
        ValueError: at every rank: the checkpoint's identity is not `identity`, and names what differs; or what it holds
            is not what this model needs.
    """
    stored, adapted = Agreement().call_on_main(lambda: _stored_names(directory, identity))

    def load() -> tuple[dict[str, Any], tuple[int, set[str]]]:
        state = _load_model(directory, model, dims, adapted=adapted)
        model_state = _model_state(model, dims)  # Megatron took the parameters out of the first one
        with torch.no_grad():
            return state, load_state(optimizer.megatron, model_state, stored, lambda wanted: _read(directory, wanted))

    state, counts = _at_every_rank(directory, load)
    of_ranks = Agreement().gather(counts)
    optimizer.continue_from(state["optimizer"][_UPDATES] if any(known for known, _ in of_ranks) else 0)
    return EngineState(**state[RUN]), len(set().union(*(names for _, names in of_ranks)))


def load_weights(directory: Path, model: DashGPTModel, dims: ParallelDims, identity: dict[str, Any]) -> EngineState:
    """Load the weights alone, in place. A collective: all ranks call it.

    The checkpoint may come from any parallel layout, and any `distributed_optimizer`.

    Raises:
        FileNotFoundError, OSError, ValueError: at every rank: see `load_checkpoint`.
    """

    def check() -> bool:
        saved = read_engine_state(directory)
        known = {name: value for name, value in saved.identity.items() if name != "distributed_optimizer"}
        check_fit(directory, replace(saved, identity=known), identity)
        return LORA in saved.identity

    adapted = Agreement().call_on_main(check)
    state = _at_every_rank(directory, lambda: _load_model(directory, model, dims, adapted=adapted))
    return EngineState(**state[RUN])


def _tensors_to_write(model: DashGPTModel, optimizer: Optimizer, dims: ParallelDims) -> list[ShardedTensor]:
    """Return the tensors that this rank writes, and no other one. Local."""
    model_state = _model_state(model, dims)
    moments = state_to_save(optimizer.megatron, model_state)
    apply_factories(model_state)
    replicated = [*nested_values(model_state), *moments.replicated]
    return [*share_of(first_copies(replicated), dims.dp_cp_group), *first_copies(moments.own)]


def _load_model(directory: Path, model: DashGPTModel, dims: ParallelDims, *, adapted: bool) -> dict[str, Any]:
    """Load the weights of this rank; returns all that the checkpoint holds besides tensors.

    Args:
        adapted: the checkpoint has adapters; otherwise the model's stay as they are.
    """
    wanted = {name: one for name, one in _model_state(model, dims).items() if ADAPTERS not in name or adapted}
    state: dict[str, Any] = dist_checkpointing.load({"model": wanted}, str(directory))
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    if absent := [name for name in missing if name in wanted or ADAPTERS not in name] + unexpected:
        raise ValueError(f"{absent} are in one of both only")
    return state


def _at_every_rank(directory: Path, load: Callable[[], T]) -> T:
    """Return this rank's `load()`; raise the first rank's failure, as OSError or ValueError, at every rank."""
    found: T | None = None
    failure: tuple[str, int | None] | None = None
    try:
        found = load()
    except CheckpointException as error:  # is not an Exception
        # All ranks raise one of all ranks' reading. Since 0.18, Megatron-core has each rank read alone as its rank 0.
        own = dist.get_rank()
        text = "; ".join(f"rank {rank or own}: {reason[0]}" for rank, reason in error.failures.items()) or str(error)
        failure = text, next((_errno(reason[0]) for reason in error.failures.values()), None)
    except Exception as error:  # a checkpoint whose inside is not what Megatron expects fails in many ways
        failure = f"{type(error).__name__}: {error}", _errno(error)
    if failures := [one for one in Agreement().gather(failure) if one is not None]:
        reason, number = failures[0]
        if number is not None:
            raise OSError(number, f"{directory} cannot be read: {reason}")
        raise ValueError(f"{directory} does not hold what this model needs: {reason}")
    assert found is not None
    return found


def _stored_names(directory: Path, identity: dict[str, Any]) -> tuple[set[str], bool]:
    """Names of the tensors in a checkpoint, and True if it has adapters.

    Raises OSError or ValueError, also if it does not fit this run.
    """
    run = read_engine_state(directory)
    check_fit(directory, run, identity)
    return set(read_index(directory / INDEX).state_dict_metadata), LORA in run.identity


def _read(directory: Path, wanted: list[ShardedTensor]) -> None:
    """Read blocks of the checkpoint's tensors into the memory that they describe. A collective."""
    # Not every rank reads every parameter, and Megatron would miss the others.
    dist_checkpointing.load({"wanted": wanted}, str(directory), validate_access_integrity=False)


def _errno(error: BaseException) -> int | None:
    """Return the errno of a storage error; a missing file is a fault of the checkpoint, not of the storage."""
    return error.errno if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else None


def _model_state(model: DashGPTModel, dims: ParallelDims) -> dict[str, Any]:
    return {
        name: value
        for name, value in model.sharded_state_dict(metadata={"dp_cp_group": dims.dp_cp_group}).items()
        # Transformer Engine's, and empty without it: pickled objects, which no checkpoint here contains.
        if not name.endswith("_extra_state")
    }


def create_directory(directory: Path) -> None:
    """Create the directory of a new checkpoint. Raises OSError, also for a directory that is not empty."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        is_empty = not any(directory.iterdir())
    except OSError as error:
        raise OSError(f"cannot create the checkpoint directory {directory}: {error}") from None
    if not is_empty:
        raise OSError(f"{directory} is not empty: save to a new directory")


def check_fit(directory: Path, run: EngineState, identity: dict[str, Any]) -> None:
    """Raise ValueError, which names what differs, if a checkpoint's identity is not `identity`.

    A run with adapters may begin with a checkpoint without them.
    """
    differing = [
        f"{key} is {run.identity.get(key)!r} in the checkpoint and {identity.get(key)!r} in this run"
        for key in sorted(identity.keys() | run.identity.keys())
        if run.identity.get(key) != identity.get(key) and not (key == LORA and LORA not in run.identity)
    ]
    if LORA in run.identity and run.identity[LORA] != identity.get(LORA):
        differing.append("set trainable.lora to that of the checkpoint, or export it, and name that in model.weights")
    if differing:
        raise ValueError(f"{directory} does not fit this run: {'; '.join(differing)}")


def _complete(plan: WritePlan, outcomes: list[tuple[list[WriteItem], list[WriteResult], OSError | None]]) -> None:
    """Write the index of what all ranks have written. Raises OSError: they have not, or the index cannot be written."""
    failures = {rank: error for rank, (*_, error) in enumerate(outcomes) if error is not None}
    if failures:
        raise _joined_error(failures)
    try:
        plan.write_index([items for items, *_ in outcomes], [results for _, results, _ in outcomes])
    except OSError:
        raise
    except Exception as error:  # of any kind: the other ranks wait for this one's answer
        raise OSError(f"{type(error).__name__}: {error}") from None


def _joined_error(failures: dict[int, OSError]) -> OSError:
    """Join the errors of several ranks into one, with the first one's errno, by which a full disk is known."""
    rank, first = next(iter(failures.items()))
    others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
    return OSError(first.errno, f"rank {rank} could not write{others}: {first.strerror or first}", first.filename)
