"""Content of a complete checkpoint, listed in its `metadata.json`, and the ways in which a damaged one differs.

Knows sizes, checksums and the run's state; does not know which of several checkpoints to use, nor ranks.
"""

import errno
import functools
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from dash_dist.checkpoints.folders import step_of
from dash_dist.checkpoints.pickles import find_unsafe_content, read_sections
from dash_dist.run.files import write_json
from dash_dist.run.state import STRICT, RunState

METADATA = "metadata.json"
DATA_STATE = "data.json"
ENGINE = "engine"

_PIECE = 1 << 24


class DamagedCheckpoint(ValueError):
    """A checkpoint's content is not what was written; the message names the file and what is wrong with it."""


class FileChecksum(NamedTuple):
    """Bytes of a file and their CRC-32."""

    size: int
    crc32: int


@dataclass(frozen=True)
class CheckpointMetadata:
    """The content of `metadata.json`.

    Attributes:
        saved_at: when the step was done, in seconds since 1970.
        files: every other file of the checkpoint, by its path relative to the folder.
    """

    __pydantic_config__ = STRICT

    state: RunState
    saved_at: float
    files: dict[str, FileChecksum]

    @property
    def size(self) -> int:
        """Bytes of all files but `metadata.json`."""
        return sum(checksum.size for checksum in self.files.values())


_METADATA_TYPE = TypeAdapter(CheckpointMetadata)


def checksum_of(path: Path) -> FileChecksum:
    """Read `path` to its end. Raises OSError."""
    crc = size = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
            size += len(piece)
    return FileChecksum(size, crc)


def write_metadata(folder: Path, metadata: CheckpointMetadata) -> None:
    """Write `metadata.json`, which marks `folder` as complete, with a checksum of itself. Raises OSError."""
    content = asdict(metadata)
    write_json(folder / METADATA, {**content, "crc32": _checksum_of_json(content)})


def read_metadata(folder: Path) -> CheckpointMetadata:
    """`metadata.json` of `folder`, checked by itself: no other file is looked at.

    Raises:
        DamagedCheckpoint: it is missing, cut short, altered, of another kind, or of another step than the folder says.
        OSError: it cannot be read for a reason that says nothing of its content.
    """
    path = folder / METADATA
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedCheckpoint(f"{path} is missing: {folder} is not a complete checkpoint") from None
    except ValueError as error:  # no UTF-8, or no JSON
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict) or "crc32" not in content:
        raise DamagedCheckpoint(f"{path} is damaged: not the metadata of a checkpoint")
    if content.pop("crc32") != _checksum_of_json(content):
        raise DamagedCheckpoint(f"{path} is damaged: its content is not that of its own checksum")
    try:
        # From JSON and not from `content`, because a strict check takes a list for a tuple only there.
        metadata = _METADATA_TYPE.validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedCheckpoint(f"{path} is damaged: {where}: {first['msg']}") from None
    if step_of(folder) not in (None, metadata.state.step):
        raise DamagedCheckpoint(f"{path} is damaged: it is of step {metadata.state.step}")
    for name in metadata.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedCheckpoint(f"{path} is damaged: it lists {name!r}, which is outside of the checkpoint")
    if DATA_STATE not in metadata.files:
        raise DamagedCheckpoint(f"{path} is damaged: it does not list {DATA_STATE}")
    return metadata


def find_damage(
    folder: Path, metadata: CheckpointMetadata, names: Iterable[str] | None = None, *, sizes_only: bool = False
) -> dict[str, str]:
    """Compare the files of `folder` with `metadata`, and look into those that Python objects would be read from.

    Args:
        names: the files to check; all by default, and then also that there are no others.
        sizes_only: read no file.

    Returns:
        File -> a message that names it and says what is wrong; empty if all is well.

    Raises OSError for a file that cannot be read for a reason that says nothing of its content.
    """
    found = find_unlisted(folder, metadata) if names is None else {}
    sections = functools.cache(read_sections)
    for name in metadata.files if names is None else names:
        problem = _damage_of_file(folder, name, metadata.files[name], sizes_only)
        if problem is None and not sizes_only and name == DATA_STATE:
            problem = _no_json_object(folder / name)
        if problem is None and not sizes_only:
            problem = find_unsafe_content(folder / name, metadata.files, sections)
        if problem is not None:
            found[name] = f"{folder / name} {problem}"
    return found


def find_unlisted(folder: Path, metadata: CheckpointMetadata) -> dict[str, str]:
    """Files that an engine would find, and that nothing here has looked into: file -> a message that names it."""
    there = (path.relative_to(folder).as_posix() for path in (folder / ENGINE).rglob("*") if path.is_file())
    return {
        name: f"{folder / name} is not safe to load: {METADATA} does not list it"
        for name in sorted(set(there) - metadata.files.keys())
    }


def read_data_state(folder: Path) -> dict[str, Any]:
    """The data position in `folder`, whose files are verified. Raises OSError."""
    return json.loads((folder / DATA_STATE).read_text())


def _checksum_of_json(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _damage_of_file(folder: Path, name: str, expected: FileChecksum, size_only: bool) -> str | None:
    try:
        size = (folder / name).stat().st_size
        if size != expected.size:
            return f"is damaged: it has {size} bytes, written were {expected.size}"
        found = expected if size_only else checksum_of(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except IsADirectoryError:
        return "is damaged: it is a folder"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"cannot be read: {error.strerror}"
    if found != expected:
        return f"is damaged: its CRC-32 is {found.crc32:08x}, that of what was written is {expected.crc32:08x}"
    return None


def _no_json_object(path: Path) -> str | None:
    try:
        is_object = isinstance(json.loads(path.read_bytes()), dict)
    except ValueError as error:
        return f"is damaged: {error}"
    return None if is_object else "is damaged: it is not a JSON object"
