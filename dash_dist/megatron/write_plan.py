"""Writing of one rank's file of a distributed checkpoint, and of the index of all ranks' files.

Knows tensors with their places in global ones, and torch's format of files and index. Does not know models.

Megatron-core's own writing shows every rank the tensors of all before training goes on, leaves the other ranks waiting
where one cannot write, starts a process that outlives a killed rank, and keeps no checksums.
"""

from __future__ import annotations

import functools
import heapq
import io
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from dash_dist.checkpoints.engine_state import COMMON
from dash_dist.checkpoints.integrity import FileChecksum
from dash_dist.megatron.host_copies import HostCopies, is_written_by_gpu


@dataclass(frozen=True)
class Written:
    """Files that one rank has written, for the index and for readers."""

    results: list[WriteResult]
    checksums: dict[str, FileChecksum]


class WritePlan:
    """Tensors that this rank writes.

    Args:
        directory: of the checkpoint.
        tensors: those that this rank writes, and no other one.
        common: everything else, at rank 0; the others have none.
        copies: where tensors on a GPU, and those in memory that a GPU writes to, are copied when this is made. The
            others are written as they are then by a process that is forked before they change. None: `write` is called
            before any tensor changes, and brings one after another to the host.

    Raises:
        RankError: the host has too little memory for the copies.

    Attributes:
        path: this rank's file; without tensors, there is none.
        items: where in the checkpoint's tensors this rank's are.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[ShardedTensor],
        common: dict[str, Any] | None,
        copies: HostCopies | None,
    ) -> None:
        self._directory = directory
        self._common = common
        self._writer = _Writer(directory)
        self.path = directory / f"__{dist.get_rank()}_0{DEFAULT_SUFFIX}"
        self.items = [_item_of(tensor) for tensor in tensors]
        self._tensors = [tensor.data.detach() for tensor in tensors]
        if copies is not None:
            changing = {index: one for index, one in enumerate(self._tensors) if is_written_by_gpu(one)}
            for index, copied in zip(changing, copies.copy(list(changing.values())), strict=True):
                self._tensors[index] = copied

    def write(self) -> Written:
        """Write this rank's files, which are on disk when this returns. Raises OSError."""
        results, checksums = [], {}
        if self.items:
            with _ChecksummedFile(self.path) as file:
                results = [self._write(file, *one) for one in zip(self.items, self._tensors, strict=True)]
                checksums[self.path.name] = file.checksum()
        if self._common is not None:
            with _ChecksummedFile(self._directory / COMMON) as file:
                torch.save(self._common, file)
                checksums[COMMON] = file.checksum()
        return Written(results, checksums)

    def write_index(self, items: list[list[WriteItem]], results: list[list[WriteResult]]) -> None:
        """Write the index, and `metadata.json` last: this is rank 0, and `items` and `results` are those of all.

        Raises:
            OSError: it cannot be written.
            ValueError: the ranks' blocks of a tensor do not make it up.
        """
        self._writer.finish(Metadata(_described(item for of_rank in items for item in of_rank)), results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))

    def _write(self, file: io.BufferedWriter, item: WriteItem, tensor: torch.Tensor) -> WriteResult:
        assert item.tensor_data is not None
        return _write_item(
            self._writer.transforms,
            file,
            _alone(tensor.cpu().view(item.tensor_data.chunk.sizes)),
            item,
            self.path.name,
            serialization_format=SerializationFormat.TORCH_SAVE,
        )


def first_copies(tensors: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """Return the tensors of which no earlier tensor-parallel rank or pipeline stage has a copy."""
    return [tensor for tensor in tensors if not any(_replica(tensor)[:-1])]


def share_of(tensors: Sequence[ShardedTensor], group: dist.ProcessGroup) -> list[ShardedTensor]:
    """Return this rank's share of tensors that all ranks of a group have, in the same order; about equal in bytes."""
    loads = [(0, rank) for rank in range(dist.get_world_size(group))]
    share = []
    for tensor in sorted(tensors, key=lambda tensor: -tensor.data.nbytes):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + tensor.data.nbytes, rank))
        if rank == dist.get_rank(group):
            share.append(tensor)
    return share


class _Writer(FileSystemWriter):
    """torch's writer, whose index names the directory by a string: a `Path` in it would be an object to unpickle."""

    @property
    def checkpoint_id(self) -> str:
        return str(self.path)


class _ChecksummedFile(io.BufferedWriter):
    """A file that is written from its start to its end, and its CRC-32."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._crc = 0
        self._failure: OSError | None = None

    def write(self, content: Any) -> int:
        self._crc = zlib.crc32(content, self._crc)
        try:
            return super().write(content)
        except OSError as error:
            self._failure = error
            raise

    def __exit__(self, *details: Any) -> None:
        try:
            super().__exit__(*details)
        finally:
            if self._failure is not None:  # torch.save makes another error of it, in which a full disk is not known
                raise self._failure

    def checksum(self) -> FileChecksum:
        """Return the checksum of the bytes written, all of which are on disk then. Raises OSError."""
        self.flush()
        os.fsync(self.fileno())
        return FileChecksum(self.tell(), self._crc)


def _replica(tensor: ShardedTensor) -> tuple[int, ...]:
    """Which copy of a tensor it is: by pipeline stage, tensor-parallel rank, and rank of DP x CP."""
    assert isinstance(tensor.replica_id, tuple)
    return tensor.replica_id


def _item_of(tensor: ShardedTensor) -> WriteItem:
    offsets = torch.Size(tensor.global_offset)
    sizes = torch.Size([1] * tensor.prepend_axis_num + list(tensor.local_shape))
    return WriteItem(
        MetadataIndex(tensor.key, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=_properties(tensor.dtype),
            size=torch.Size(tensor.global_shape),
        ),
    )


def _described(items: Iterable[WriteItem]) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    """The tensors of a checkpoint with their blocks. Raises ValueError if those of one are more or less than it."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for item in items:
        data = item.tensor_data
        assert data is not None
        if item.index.fqn not in tensors:
            tensors[item.index.fqn] = TensorStorageMetadata(data.properties, data.size, [])
        tensors[item.index.fqn].chunks.append(data.chunk)
    for name, tensor in tensors.items():
        numbers = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        if numbers != math.prod(tensor.size):
            raise ValueError(f"the ranks wrote {numbers} numbers of {name}, which has {math.prod(tensor.size)}")
    return dict(tensors)


@functools.cache
def _properties(dtype: torch.dtype) -> TensorProperties:
    return TensorProperties(dtype=dtype)  # one object for all tensors: pickle writes it once


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as that of a tensor of its own: torch.save writes all that a view's storage holds.

    It is no copy, whose threads a forked process lacks.
    """
    assert tensor.is_contiguous()
    first = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[first : first + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
