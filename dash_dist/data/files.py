"""The files of a source: which ones, in which order, of which format and compression.

Knows names, suffixes, sizes, permissions and samples of the bytes. Does not know documents.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import io
import lzma
import os
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import pyarrow as pa

from dash_dist.config.data import SourceConfig

FileFormat = Literal["text", "jsonl", "parquet"]

_JSONL_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst"}
_UNREADABLE_SUFFIXES = {".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz"}
_NOT_PART_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_SAMPLE = 4096
_SAMPLES = 64


def standard_library_files() -> list[str]:
    """Return the sources of the running Python's standard library, sorted."""
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_PART_OF_THE_LIBRARY]  # installed packages: seconds
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    paths.sort()
    if not paths:
        raise FileNotFoundError(
            f"no .py files below {root}: this Python has no library sources; set data.source=files and data.paths"
        )
    return paths


def printable(path: str | Path) -> str:
    """Return the path for messages: logs and others take no str that is not UTF-8, which the name of a file can be."""
    return str(path).encode("utf-8", errors="backslashreplace").decode()


def resolve_paths(source: SourceConfig) -> list[str]:
    """Return the absolute paths of all files, in the order of `source.paths`."""
    files: dict[str, None] = {}
    for given in source.paths:
        path = os.path.abspath(os.path.expanduser(given))
        if os.path.isdir(path):
            found = _files_below(Path(path), source.format)
        elif os.path.lexists(path):
            found = [path]
        else:
            found = sorted(match for match in glob.glob(path, recursive=True) if not os.path.isdir(match))
        if not found:
            raise FileNotFoundError(
                f"data.paths: {given!r} matches no file (looked for {printable(path)}, data.format={source.format}): "
                "correct the path, which every node must see"
            )
        files.update(dict.fromkeys(found))
    return list(files)


def _files_below(folder: Path, file_format: str) -> list[str]:
    def belongs(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        # Anything but a folder: a link that leads nowhere is reported later, not left out silently.
        kept = file_format in ("auto", "text") or _format_by_suffix(path) == file_format
        return not hidden and not path.is_dir() and kept

    return sorted(str(path) for path in folder.rglob("*") if belongs(path))


def _format_by_suffix(path: Path) -> FileFormat:
    suffix = path.suffix.lower()
    if suffix in _UNREADABLE_SUFFIXES:
        raise ValueError(
            f"{printable(path)} is packed ({suffix}), which is not read: unpack it, or compress it by "
            f"{', '.join(sorted(_COMPRESSED_SUFFIXES))}"
        )
    compressed = suffix in _COMPRESSED_SUFFIXES
    if compressed:
        suffix = Path(path.stem).suffix.lower()
    if suffix == ".parquet" and compressed:
        raise ValueError(f"{printable(path)} is a compressed Parquet file: decompress it; Parquet compresses by itself")
    return "jsonl" if suffix in _JSONL_SUFFIXES else "parquet" if suffix == ".parquet" else "text"


def format_of(path: str, source: SourceConfig) -> FileFormat:
    """Return the format of one file: the source's, or the one of its suffix."""
    return source.format if source.format != "auto" else _format_by_suffix(Path(path))


def is_compressed(path: str) -> bool:
    """Return whether `open_bytes` decompresses the file."""
    return Path(path).suffix.lower() in _COMPRESSED_SUFFIXES


def open_bytes(path: str) -> IO[bytes]:
    """Open a file for reading, decompressed by its suffix. Damage shows as an error of `DECOMPRESSION_ERRORS` later."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if suffix == ".zst":
        # By the bytes of its name: pyarrow refuses a str that is not UTF-8.
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(os.fsencode(path)), "zstd"), 1 << 20)
    return open(path, "rb")


def encoding_of(path: str) -> tuple[str, int]:
    """Return the text encoding of a file, and the bytes of its byte order mark: UTF-8 unless the mark says UTF-16."""
    with open_bytes(path) as file:
        head = file.read(3)
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


@dataclass(frozen=True)
class FileIdentity:
    """Content of a file, without reading it whole.

    Attributes:
        size: bytes.
        digests: of each block of the file; of a block over 256 KiB, of samples.
    """

    size: int
    digests: tuple[str, ...]


def stat_of_readable_file(path: str) -> os.stat_result:
    """Return the status of a regular file that may be read. Raises an error that names the file otherwise."""
    status = os.stat(path)  # FileNotFoundError names the file, also for a link that leads nowhere
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe or a terminal would wait for ever.
        raise ValueError(f"{printable(path)} is not a regular file: give a file, a folder or a glob")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{printable(path)} may not be read by this user: change its permissions or leave it out")
    return status


def identity_of(path: str, size: int, block: int) -> FileIdentity:
    """Read the samples of a file of `size` bytes, in blocks of `block` bytes."""
    digests = []
    with open(path, "rb") as file:
        for start in range(0, max(size, 1), block):
            length, digest = min(block, size - start), hashlib.blake2b(digest_size=12)
            if length <= _SAMPLE * _SAMPLES:
                file.seek(start)
                digest.update(file.read(length))
            else:
                for sample in range(_SAMPLES):
                    file.seek(start + (length - _SAMPLE) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
            digests.append(digest.hexdigest())
    return FileIdentity(size, tuple(digests))
