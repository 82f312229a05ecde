"""Model, optimizer and step in Megatron-core's distributed checkpoint, loadable at another parallel layout.

Knows one checkpoint directory. Does not know which of a run's checkpoints to keep or to load, nor whether the files are
those that were written: who calls `load_checkpoint` has verified them (`dash_dist.checkpoints`).

Megatron-core plans what each rank writes, and reads it back. The writing itself is here, since Megatron's leaves the
other ranks waiting where one cannot write, starts a process that outlives a killed rank, and keeps no checksums.
"""

from __future__ import annotations

import io
import os
import queue
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from dash_dist.checkpoints.background import FinishedCall, ForkedCall
from dash_dist.checkpoints.engine_state import COMMON, RUN, EngineState, read_engine_state
from dash_dist.checkpoints.integrity import FileChecksum
from dash_dist.distributed.agreement import Agreement
from dash_dist.megatron.model import DashGPTModel
from dash_dist.megatron.optimizer import Optimizer
from dash_dist.megatron.parallel import ParallelDims


@dataclass(frozen=True)
class _Written:
    """Files that one rank has written, for the index and for readers."""

    results: list[WriteResult]
    checksums: dict[str, FileChecksum]


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's plan of what each rank writes, without its way of writing it."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: tuple[Any, ...]) -> _Plan:
        _, index, _ = planned
        return _Plan(writer, index)


class _Plan:
    """Write plan of this rank.

    Attributes:
        index: where the tensors of all ranks are, at rank 0; the others have none.
        common: the content of `common.pt`, at rank 0.
    """

    def __init__(self, writer: FileSystemWriterAsync, index: Metadata | None) -> None:
        self._writer = writer
        self._buckets = writer.write_buckets or []
        self.index = index
        self.common: bytes | None = None

    def copy_to_host(self) -> None:
        """Wait until no tensor is on the GPU any more."""
        self._buckets = FileSystemWriterAsync.preload_tensors(self._buckets, non_blocking=True)
        self._writer.write_buckets = None

    def write(self) -> _Written:
        """Write this rank's files, which are on disk when this returns. Raises OSError."""
        results, checksums = [], {}
        for path, name, (objects, tensors) in self._buckets:
            assert not objects  # see `_sharded_state`
            with _ChecksummedFile(Path(path)) as file:
                results += [self._write_tensor(file, name, item, tensor) for item, tensor in tensors]
                checksums[name] = file.checksum()
        if self.common is not None:
            with _ChecksummedFile(Path(self._writer.checkpoint_dir) / COMMON) as file:
                file.write(self.common)
                checksums[COMMON] = file.checksum()
        return _Written(results, checksums)

    def write_index(self, results: list[list[WriteResult]]) -> None:
        """Write the index, and `metadata.json` last: this rank is 0 and `results` are those of all. Raises OSError."""
        assert self.index is not None
        vars(self.index).pop("all_local_plans", None)  # as long as the index itself, and nothing here reads it
        self._writer.finish(self.index, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._writer.checkpoint_dir))

    def _write_tensor(self, file: io.BufferedWriter, name: str, item: WriteItem, tensor: torch.Tensor) -> WriteResult:
        return _write_item(
            self._writer.transforms, file, tensor, item, name, serialization_format=SerializationFormat.TORCH_SAVE
        )


class _ChecksummedFile(io.BufferedWriter):
    """A file that is written from its start to its end, and its CRC-32."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._crc = 0

    def write(self, content: Any) -> int:
        self._crc = zlib.crc32(content, self._crc)
        return super().write(content)

    def checksum(self) -> FileChecksum:
        """Return the checksum of the bytes written, all of which are on disk then. Raises OSError."""
        self.flush()
        os.fsync(self.fileno())
        return FileChecksum(self.tell(), self._crc)


class MegatronSave:
    """A checkpoint that is being written, at one rank: a `PendingSave`."""

    def __init__(self, plan: _Plan, dims: ParallelDims, *, background: bool) -> None:
        self._dims = dims
        self._plan: _Plan | None = plan  # keeps the host's copy of the tensors until it is written
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
        written, failure = _Written([], {}), None
        try:
            written = self._writing.result()
        except OSError as error:
            failure = error
        outcomes: list[Any] | None = [None] * self._dims.world_size if self._dims.rank == 0 else None
        dist.gather_object((written.results, failure), outcomes)
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
    background: bool,
) -> MegatronSave:
    """Begin to write the state at the time of the call. A collective: all ranks call it.

    GPU tensors are copied to the host before this returns. What is in the host's memory then is written by a forked
    copy of the process, and not changed by what this one does.

    Args:
        directory: on storage that all ranks share; created, and must be empty.
        run: rank 0's is kept.
        background: otherwise this rank has written when this returns.

    Raises:
        OSError: at every rank: the directory cannot be created, or is not empty.
    """
    Agreement().call_on_main(lambda: create_directory(directory))
    state = _sharded_state(model, optimizer, dims, is_loading=False)
    if state["optimizer"].get("param_state") is None:
        # The distributed optimizer's state is gathered on one rank; the others' empty entry would look to
        # Megatron like a difference between the ranks.
        state["optimizer"].pop("param_state", None)
    state[RUN] = asdict(run)
    tensors, common = save_preprocess(state)
    if filesystem_async._results_queue is None:
        # Megatron's plan comes with a queue between its writing processes, kept by yet another process that would
        # outlive a killed rank.
        filesystem_async._results_queue = queue.Queue()
    plan: _Plan = _PlanOnly("torch_dist", 1, thread_count=1).async_save(tensors, directory)
    if dims.rank == 0:
        content = io.BytesIO()
        torch.save(common, content)
        plan.common = content.getvalue()
    plan.copy_to_host()
    return MegatronSave(plan, dims, background=background)


def load_checkpoint(
    directory: Path, model: DashGPTModel, optimizer: Optimizer, dims: ParallelDims, identity: dict[str, Any]
) -> EngineState:
    """Load weights and optimizer state in place. A collective: all ranks call it.

    The checkpoint may come from another tensor-, context-, pipeline- and data-parallel size.

    Raises:
        FileNotFoundError: at every rank: there is no complete checkpoint in the directory.
        OSError: at every rank: the storage does not give it.
        ValueError: at every rank: the checkpoint's identity is not `identity`, and names what differs; or what it holds
            is not what this model needs.
    """
    Agreement().call_on_main(lambda: check_fit(directory, read_engine_state(directory), identity))
    return _load(directory, model, optimizer, dims)


def load_weights(directory: Path, model: DashGPTModel, dims: ParallelDims, identity: dict[str, Any]) -> EngineState:
    """Load the weights alone, in place. A collective: all ranks call it.

    The checkpoint may come from any parallel layout, and any `distributed_optimizer`.

    Raises:
        FileNotFoundError, OSError, ValueError: at every rank: see `load_checkpoint`.
    """

    def check() -> None:
        saved = read_engine_state(directory)
        known = {name: value for name, value in saved.identity.items() if name != "distributed_optimizer"}
        check_fit(directory, replace(saved, identity=known), identity)

    Agreement().call_on_main(check)
    return _load(directory, model, None, dims)


def _load(directory: Path, model: DashGPTModel, optimizer: Optimizer | None, dims: ParallelDims) -> EngineState:
    run: EngineState | None = None
    failure: tuple[str, int | None] | None = None
    try:
        state = dist_checkpointing.load(_sharded_state(model, optimizer, dims, is_loading=True), str(directory))
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        run = EngineState(**state[RUN])
    except CheckpointException as error:  # of all ranks' reading, raised at every one; is not an Exception
        text = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items()) or str(error)
        failure = text, next((_errno(reason[0]) for reason in error.failures.values()), None)
    except Exception as error:  # a checkpoint whose inside is not what Megatron expects fails in many ways
        failure = f"{type(error).__name__}: {error}", _errno(error)
    if found := [one for one in Agreement().gather(failure) if one is not None]:
        reason, number = found[0]
        if number is not None:
            raise OSError(number, f"{directory} cannot be read: {reason}")
        raise ValueError(f"{directory} does not hold what this model needs: {reason}")
    assert run is not None
    return run


def _errno(error: BaseException) -> int | None:
    """Return the errno of a storage error; a missing file is a fault of the checkpoint, not of the storage."""
    return error.errno if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else None


def _sharded_state(
    model: DashGPTModel, optimizer: Optimizer | None, dims: ParallelDims, *, is_loading: bool
) -> dict[str, Any]:
    """Model's and optimizer's tensors by the places of their shards; None leaves the optimizer out."""
    metadata = {
        "dp_cp_group": dims.dp_cp_group,
        # The format in which every optimizer tensor has its weight's shape, so that any layout can load it.
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gather the shards on one rank of DP x CP rather than on all.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }
    model_state = {
        name: value
        for name, value in model.sharded_state_dict(metadata=metadata).items()
        # Transformer Engine's, and empty without it: pickled objects, which no checkpoint here contains.
        if not name.endswith("_extra_state")
    }
    state = {"model": model_state}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model_state, metadata, is_loading=is_loading)
    return state


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
    """Raise ValueError, which names what differs, if a checkpoint's identity is not `identity`."""
    differing = [
        f"{key} is {run.identity.get(key)!r} in the checkpoint and {identity.get(key)!r} in this run"
        for key in sorted(identity.keys() | run.identity.keys())
        if run.identity.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(f"{directory} does not fit this run: {'; '.join(differing)}")


def _complete(plan: _Plan, outcomes: list[tuple[list[WriteResult], OSError | None]]) -> None:
    """Write the index of what all ranks have written. Raises OSError: they have not, or the index cannot be written."""
    failures = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
    if failures:
        raise _joined_error(failures)
    try:
        plan.write_index([results for results, _ in outcomes])
    except OSError:
        raise
    except Exception as error:  # of any kind: the other ranks wait for this one's answer
        raise OSError(f"{type(error).__name__}: {error}") from None


def _joined_error(failures: dict[int, OSError]) -> OSError:
    """Join the errors of several ranks into one, with the first one's errno, by which a full disk is known."""
    rank, first = next(iter(failures.items()))
    others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
    return OSError(first.errno, f"rank {rank} could not write{others}: {first.strerror or first}", first.filename)
