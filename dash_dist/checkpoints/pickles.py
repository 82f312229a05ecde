"""Reading pickles that a stranger may have written: nothing but the listed names is ever looked up in them.

A pickle is a program, and unpickling runs it: one that names `os.system` calls it. torch's distributed checkpoint keeps
its index (`.metadata`) as a pickle, and the archives of `torch.save` (`common.pt`, and each tensor inside a `.distcp`
file) hold one. Before any of them is handed to torch or Megatron, every global name in it is compared with a list.

Knows pickles and the archives around them; does not know what a checkpoint means. See "Restricting Globals" in the
documentation of Python's `pickle`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

from dash_dist.garbage import no_garbage_collection

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INDEX = ".metadata"
_SHARDS = ".distcp"
_ARCHIVE = ".pt"
_PLAIN = (".json", ".safetensors")

_DTYPES = frozenset(
    ("torch", name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
)
_STORAGES = frozenset(
    ("torch", f"{kind}Storage")
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
)
_DISTRIBUTED = "torch.distributed.checkpoint"
_IN_INDEX = _DTYPES | {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_DISTRIBUTED}.filesystem", "_StorageInfo"),
    *(
        (f"{_DISTRIBUTED}.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
_IN_ARCHIVE = (
    _DTYPES
    | _STORAGES
    | {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
    }
)


class UnsafeFile(ValueError):
    """A file holds, or would run, something that no checkpoint of this program contains."""


Sections = dict[str, list[tuple[int, int]]]
"""File -> offset and length in it of each tensor."""


def find_unsafe_content(path: Path, listed: Collection[str], sections: Callable[[Path], Sections]) -> str | None:
    """Why `path` must not be handed to torch, as the end of a sentence that begins with its name; None if it may.

    Args:
        listed: the files of the checkpoint, relative to the folder above that of `path`: an index may name no other.
        sections: `read_sections`, which may remember its answers: an index is of many files.

    Raises OSError.
    """
    try:
        if path.name == INDEX:
            _check_index(read_index(path), path.parent, listed)
        elif path.suffix == _SHARDS:
            _check_shards(path, sections)
        elif path.suffix == _ARCHIVE:
            with path.open("rb") as file:
                _check_archive(file)
        elif path.suffix not in _PLAIN:
            return f"is of no kind that a checkpoint holds: {_known()}"
    except UnsafeFile as error:
        return str(error)
    return None


def read_index(path: Path) -> Metadata:
    """The index of a torch distributed checkpoint: where in which file each tensor is.

    Raises:
        UnsafeFile: it names a class or function that is not part of an index, or is none; the message ends a sentence
            that begins with the file's name.
        OSError: it cannot be read.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    with no_garbage_collection():  # which would look through an index of many ranks time and again
        index = _unpickle(_IndexUnpickler(io.BytesIO(path.read_bytes())))
    if not isinstance(index, Metadata):
        raise UnsafeFile(f"is damaged: it holds a {type(index).__name__}, not the index of a distributed checkpoint")
    return index


def read_sections(path: Path) -> Sections:
    """Return where in its file each tensor of an index is. Raises as `read_index`; damaged, it may raise more."""
    sections: Sections = {}
    for place in read_index(path).storage_data.values():
        sections.setdefault(place.relative_path, []).append((place.offset, place.length))
    return sections


class FileSection(io.RawIOBase):
    """`length` bytes of a file from `start`, to be read as if they were a file of their own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if self._position < 0:
            raise ValueError(f"position {self._position} is before the start")
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        content = self._file.read(max(0, min(len(buffer), self._length - self._position)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class _ListedUnpickler(pickle.Unpickler):
    """Looks up listed names only."""

    allowed: frozenset[tuple[str, str]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise UnsafeFile(
                f"is not safe to load: it names {module}.{name}, which no checkpoint of this program does; "
                f"do not use it, and find out who wrote it"
            )
        return super().find_class(module, name)


class _IndexUnpickler(_ListedUnpickler):
    allowed = frozenset(_IN_INDEX)

    def find_class(self, module: str, name: str) -> Any:
        # Python before 3.11.4 pickles a member of an enumeration as `getattr(enumeration, name)`.
        return _memory_format if (module, name) == ("builtins", "getattr") else super().find_class(module, name)


def _memory_format(owner: Any, name: str) -> Any:
    """Stand for `getattr`, for the one enumeration in an index."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if owner is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise UnsafeFile(
            f"is not safe to load: it asks for {name!r} of {owner!r}, which no checkpoint of this program does; "
            "do not use it, and find out who wrote it"
        )
    return _MEM_FORMAT_ENCODING[name]


class _ArchiveScanner(_ListedUnpickler):
    """Goes through a pickle without making anything of it: what it names is replaced by something that does nothing."""

    allowed = frozenset(_IN_ARCHIVE)

    def find_class(self, module: str, name: str) -> Any:
        super().find_class(module, name)
        return _Nothing

    def persistent_load(self, pid: Any) -> Any:
        return _Nothing()


class _Nothing:
    """Whatever a pickle does to an object, done to this one has no effect."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


def _unpickle(unpickler: pickle.Unpickler) -> Any:
    try:
        return unpickler.load()
    except UnsafeFile:
        raise
    except Exception as error:  # a garbled pickle can fail in any way
        raise UnsafeFile(f"is damaged: not a pickle that can be read ({type(error).__name__}: {error})") from None


def _check_index(index: Metadata, directory: Path, listed: Collection[str]) -> None:
    """An index may only speak of tensors, in files of the checkpoint."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    if not isinstance(index.state_dict_metadata, dict) or not isinstance(index.storage_data, dict):
        raise UnsafeFile("is damaged: it has no table of tensors")
    for key, tensor in index.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(tensor, TensorStorageMetadata):
            raise UnsafeFile(f"is not safe to load: its entry {key!r} is not a tensor but an object to be unpickled")
    sizes: dict[str, int] = {}
    for key, place in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise UnsafeFile(f"is damaged: its entry {key!r} is not a place in a file")
        name = place.relative_path
        if not isinstance(name, str) or f"{directory.name}/{name}" not in listed or not name.endswith(_SHARDS):
            raise UnsafeFile(f"is damaged: it names the file {name!r}, which the checkpoint does not have")
        if name not in sizes:
            sizes[name] = _size(directory / name)
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise UnsafeFile(f"is damaged: {key.fqn} would be beyond the end of {name}")


def _check_shards(path: Path, sections: Callable[[Path], Sections]) -> None:
    """Each tensor in a `.distcp` file is an archive; the index next to it gives their positions."""
    try:
        places = sections(path.parent / INDEX).get(path.name, [])
    except (UnsafeFile, AttributeError, TypeError, FileNotFoundError):
        return  # said of the index itself
    with path.open("rb") as file:
        for offset, length in places:
            _check_archive(FileSection(file, offset, length))


def _check_archive(file: IO[bytes] | FileSection) -> None:
    try:
        with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
            pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
            if len(pickles) != 1 or PurePosixPath(pickles[0]).name != "data.pkl":
                raise UnsafeFile(f"is not safe to load: an archive of tensors has one data.pkl, this one {pickles}")
            content = archive.read(pickles[0])
    except UnsafeFile:
        raise
    except Exception as error:  # a garbled archive can fail in any way
        raise UnsafeFile(f"is damaged: not an archive of tensors ({type(error).__name__}: {error})") from None
    _unpickle(_ArchiveScanner(io.BytesIO(content)))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # said of the file itself


def _known() -> str:
    return ", ".join((INDEX, f"*{_SHARDS}", f"*{_ARCHIVE}", *(f"*{suffix}" for suffix in _PLAIN)))
