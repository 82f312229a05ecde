"""The files of a corpus: which ones, in which order, of which format.

Knows names, suffixes, sizes and permissions. Does not open a file.
"""

import glob
import hashlib
import json
import os
import stat
import sysconfig
from pathlib import Path
from typing import Any

from dash_dist.config.data import DataConfig

_JSONL_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"}
_NOT_PART_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def standard_library_files() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        str(path)
        for path in root.rglob("*.py")
        if not _NOT_PART_OF_THE_LIBRARY.intersection(path.relative_to(root).parts)
    )
    if not paths:
        raise FileNotFoundError(
            f"no .py files below {root}: this Python has no library sources; set data.source=files and data.paths"
        )
    return paths


def printable(path: str | Path) -> str:
    """The path for messages: logs, TensorBoard and others take no str that is not UTF-8, which a file's name may be."""
    return str(path).encode("utf-8", errors="backslashreplace").decode()


def resolve_paths(config: DataConfig) -> list[str]:
    """Absolute paths of all files, in the order of `config.paths`."""
    files: dict[str, None] = {}
    for given in config.paths:
        path = os.path.abspath(os.path.expanduser(given))
        if os.path.isdir(path):
            found = _files_below(Path(path), config.format)
        elif os.path.lexists(path):
            found = [path]
        else:
            found = sorted(match for match in glob.glob(path, recursive=True) if not os.path.isdir(match))
        if not found:
            raise FileNotFoundError(
                f"data.paths: {given!r} matches no file (looked for {printable(path)}, data.format={config.format}): "
                "correct the path, which every node must see"
            )
        files.update(dict.fromkeys(found))
    return list(files)


def _files_below(folder: Path, file_format: str) -> list[str]:
    def belongs(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        # Anything but a folder: a link that leads nowhere is reported later, not left out silently.
        kept = file_format in ("auto", "text") or _suffix_format(path) == file_format
        return not hidden and not path.is_dir() and kept

    return sorted(str(path) for path in folder.rglob("*") if belongs(path))


def _suffix_format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED_SUFFIXES:
        raise ValueError(f"{printable(path)} is compressed ({suffix}), which is not read: decompress it or use Parquet")
    return "jsonl" if suffix in _JSONL_SUFFIXES else "parquet" if suffix == ".parquet" else "text"


def format_of(paths: list[str], config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    example = {_suffix_format(Path(path)): path for path in paths}
    if len(example) > 1:
        raise ValueError(
            "data.paths has files of several formats, "
            f"{', '.join(f'{k} ({printable(v)})' for k, v in sorted(example.items()))}: "
            "give files of one format, or set data.format"
        )
    file_format = next(iter(example))
    if file_format == "text" and config.text_column != "text":
        raise ValueError(
            f"data.text_column={config.text_column}: {printable(paths[0])} is read as text, which has no columns: "
            "drop data.text_column or set data.format"
        )
    return file_format


def size_of_readable_file(path: str) -> int:
    status = os.stat(path)  # FileNotFoundError names the file, also for a link that leads nowhere
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe or a terminal would wait for ever.
        raise ValueError(f"{printable(path)} is not a regular file: give a file, a folder or a glob")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{printable(path)} may not be read by this user: change its permissions or leave it out")
    return status.st_size


def files_fingerprint(paths: list[str], sizes: list[int], options: list[Any]) -> str:
    """Names relative to the files' common folder, and sizes: a corpus may move, and is not read to hash it."""
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    listing = [[os.path.relpath(path, root), size] for path, size in zip(paths, sizes, strict=True)]
    return hashlib.sha256(json.dumps([options, listing]).encode()).hexdigest()[:16]
