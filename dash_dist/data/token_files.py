"""Indexed datasets of Megatron-core, opened after a check that their files are whole.

Knows the two files of a dataset; does not know which documents they hold or who wrote them. Megatron-core's own
constructor fails half-built where the index is damaged, and its destructor then fails, too.
"""

import os
import struct
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

REMEDY = "remove its folder if it is in data.cache, and its tokens are made again"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, borders of documents
_BYTES_OF_SEQUENCE = 4 + 8  # its length and its place in the file of tokens
_BYTES_OF_BORDER = 8


def open_dataset(prefix: str) -> IndexedDataset:
    """Open the dataset `prefix`.bin and `prefix`.idx. Raises ValueError if the index is not whole."""
    if (problem := _find_problem(prefix)) is not None:
        raise ValueError(f"{prefix}: not an indexed dataset of Megatron-core: {problem}; {REMEDY}")
    return IndexedDataset(prefix, mmap=False)


def _find_problem(prefix: str) -> str | None:
    paths = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
    if missing := [path for path in paths if not path.is_file()]:
        return f"{missing[0].name} is missing"
    index = paths[1]
    with index.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return f"{index.name} has {len(head)} bytes, and its header alone has {_HEADER.size}"
        magic, version, code, sequences, borders = _HEADER.unpack(head)
        if magic != _MAGIC or version != 1 or not borders:
            return f"{index.name} does not begin as an index of version 1 does"
        if code not in [member.value for member in DType]:
            return f"{index.name} has tokens of the unknown type {code}"
        expected = _HEADER.size + sequences * _BYTES_OF_SEQUENCE + borders * _BYTES_OF_BORDER
        if (actual := index.stat().st_size) < expected:
            return f"{index.name} has {actual} bytes and should have {expected}"
        file.seek(expected - _BYTES_OF_BORDER)
        (last,) = struct.unpack("<q", file.read(_BYTES_OF_BORDER))
    return None if last == sequences else f"{index.name} has {sequences} sequences and borders of {last}"


def checked_lengths(dataset: IndexedDataset) -> np.ndarray:
    """Return the tokens of each document, after a check that the file of tokens is as long. A copy."""
    lengths = np.array(dataset.sequence_lengths)
    path = f"{dataset.path_prefix}.bin"
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(dataset.index.dtype).itemsize
    if (actual := os.path.getsize(path)) != expected:
        raise ValueError(f"{path} has {actual} bytes and should have {expected}: {REMEDY}")
    return lengths
