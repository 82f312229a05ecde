"""The sources of a corpus, cut into shards that are tokenised independently.

Knows files and datasets of the hub; does not know tokens. A shard's key is made of the content of its files and of how
they are read: after a file has changed only its own shard has another key.
"""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dash_dist.config.data import MixtureSource
from dash_dist.data.columns import Columns
from dash_dist.data.files import (
    FileFormat,
    FileIdentity,
    encoding_of,
    format_of,
    identity_of,
    is_compressed,
    printable,
    resolve_paths,
    standard_library_files,
    stat_of_readable_file,
)
from dash_dist.data.readers import FileRange, HubShard, row_groups_of
from dash_dist.data.rows import Rows
from dash_dist.run.files import replace_text

_FORMAT_VERSION = 1
"""Of the tokens in the cache: a change makes all shards anew."""

_SHARD_BYTES = 128 << 20
_MAX_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class Shard:
    """A part of a source.

    Attributes:
        key: names its content and how it is read.
        parts: ranges of files, or one shard of a hub dataset.
        rows: None for texts.
        size: bytes of the files, 0 if unknown; for progress.
    """

    key: str
    parts: tuple[FileRange | HubShard, ...]
    columns: Columns
    rows: Rows | None
    size: int


@dataclass(frozen=True)
class Source:
    """One source of the corpus: its shards, or the prefixes of Megatron-core's datasets."""

    title: str
    description: str
    shards: tuple[Shard, ...] = ()
    prefixes: tuple[str, ...] = ()


def open_source(config: MixtureSource, cache: Path, reading: list[object], rows: Rows | None = None) -> Source:
    """Find the files of a source and cut them into shards, without reading their documents.

    Args:
        cache: folder that remembers the digests of files.
        reading: everything besides the files that decides on their tokens; part of every key.
        rows: None for texts.

    Raises:
        FileNotFoundError, PermissionError: paths that match nothing, files that may not be read.
        ValueError: damaged Parquet files, missing columns, prefixes without a dataset.
    """
    if config.source == "megatron":
        return Source(config.title, f"data.paths={list(config.paths)}", prefixes=tuple(_prefixes(config)))
    reading = [*reading, _FORMAT_VERSION, config.text_column if rows is None else rows.identity]
    if config.source == "hub":
        return _hub(config, reading, rows)
    if config.source == "stdlib":
        paths, description = standard_library_files(), "the standard library of this Python"
    else:
        paths, description = resolve_paths(config), f"data.paths={list(config.paths)}"
    formats = {path: format_of(path, config) for path in paths}
    if config.text_column != "text" and set(formats.values()) == {"text"}:
        raise ValueError(
            f"data.text_column={config.text_column}: {printable(paths[0])} is read as text, which has no columns: "
            "drop data.text_column or set data.format"
        )
    texts = [path for path, chosen in formats.items() if chosen == "text"]
    if rows is not None and texts:
        raise ValueError(
            f"data.rows={config.rows}: {printable(texts[0])} is read as text, which has no rows: leave it out, or set "
            "data.format"
        )
    identities = _identities(paths, cache)
    shards: list[Shard] = []
    for group in _groups(paths, identities):
        shards += _cut(group, formats, identities, config, reading, rows)
    return Source(config.title, f"{description} ({len(paths)} files)", tuple(shards))


def _prefixes(config: MixtureSource) -> Iterable[str]:
    for given in config.paths:
        prefix = os.path.abspath(os.path.expanduser(given)).removesuffix(".idx").removesuffix(".bin")
        missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not os.path.isfile(prefix + suffix)]
        if missing:
            raise FileNotFoundError(
                f"data.paths: {given!r} is not the prefix of an indexed dataset: {missing[0]} is missing"
            )
        yield prefix


def _identities(paths: list[str], cache: Path) -> dict[str, FileIdentity]:
    """Return the identity of each file; those whose size and time are as remembered are not read."""
    memory = cache / "files.json"
    try:
        remembered = json.loads(memory.read_text())
    except (OSError, ValueError):
        remembered = {}
    identities, changed = {}, False
    for path in paths:
        status, name = stat_of_readable_file(path), printable(path)
        known = remembered.get(name)
        if known is not None and known[:2] == [status.st_size, status.st_mtime_ns]:
            identities[path] = FileIdentity(status.st_size, tuple(known[2]))
            continue
        identities[path] = identity_of(path, status.st_size, _SHARD_BYTES)
        remembered[name] = [status.st_size, status.st_mtime_ns, identities[path].digests]
        changed = True
    if changed:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            replace_text(memory, json.dumps(remembered))
        except OSError:
            pass  # only a memory: a cache that cannot be written is refused where tokens are written
    return identities


def _groups(paths: list[str], identities: dict[str, FileIdentity]) -> Iterable[list[str]]:
    """Group neighbouring files to shards of about 128 MiB. A file ends its group by chance, by a digest of its name, so
    that one file more or less moves no other border.
    """
    group: list[str] = []
    size = 0
    for path in paths:
        if group and size + identities[path].size > _MAX_SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(path)
        size += identities[path].size
        chance = zlib.crc32(os.fsencode(os.path.basename(path))) / 2**32
        if chance < identities[path].size / _SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _cut(
    group: list[str],
    formats: dict[str, FileFormat],
    identities: dict[str, FileIdentity],
    config: MixtureSource,
    reading: list[object],
    rows: Rows | None,
) -> Iterable[Shard]:
    """Yield the shards of a group of files: one, or several for a single long file."""
    columns = _columns(config, rows)

    def shard(parts: tuple[FileRange, ...]) -> Shard:
        return _shard(parts, identities, columns, rows, reading)

    parts: list[FileRange] = []
    for path in group:
        size = identities[path].size
        if formats[path] == "parquet":
            row_groups = row_groups_of(path, columns)
            pieces = max(1, min(row_groups, round(size / _SHARD_BYTES)))
            cuts = [row_groups * piece // pieces for piece in range(pieces + 1)]
        else:
            whole = formats[path] == "text" or is_compressed(path) or size <= _MAX_SHARD_BYTES
            whole = whole or encoding_of(path)[0] != "utf-8"
            pieces = 1 if whole else -(-size // _SHARD_BYTES)
            cuts = [min(_SHARD_BYTES * piece, size) for piece in range(pieces + 1)]
        if pieces == 1:
            parts.append(FileRange(path, formats[path]))
            continue
        if parts:  # in the order of the files
            yield shard(tuple(parts))
            parts = []
        for start, stop in itertools.pairwise(cuts):
            ranged = FileRange(path, formats[path], start, stop)
            yield shard((ranged,))
    if parts:
        yield shard(tuple(parts))


def _shard(
    parts: tuple[FileRange, ...],
    identities: dict[str, FileIdentity],
    columns: Columns,
    rows: Rows | None,
    reading: list[object],
) -> Shard:
    content = [[part.format, _compression(part.path), *_content(part, identities[part.path])] for part in parts]
    whole = len(parts) > 1 or parts[0].stop is None
    size = sum(identities[part.path].size for part in parts) if whole else _SHARD_BYTES
    return Shard(_key([reading, content]), parts, columns, rows, size)


def _columns(config: MixtureSource, rows: Rows | None) -> Columns:
    return Columns((config.text_column,)) if rows is None else rows.columns


def _content(part: FileRange, identity: FileIdentity) -> list[object]:
    """Return what tells the content of a range from others."""
    if part.format == "jsonl" and part.stop is not None:
        # The last line may end in the next block. Lines added at the end change the last blocks alone.
        first = part.start // _SHARD_BYTES
        return [part.start, part.stop, identity.digests[first : first + 2]]
    return [part.start, part.stop, identity.size, identity.digests]


def _compression(path: str) -> str:
    return Path(path).suffix.lower() if is_compressed(path) else ""


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _hub(config: MixtureSource, reading: list[object], rows: Rows | None) -> Source:
    from datasets import config as datasets_config
    from datasets import load_dataset_builder

    assert config.name is not None  # the config's validator refuses a hub source without a name
    description = f"data.name={config.name} (subset {config.subset}, split {config.split})"
    try:
        builder = load_dataset_builder(config.name, config.subset, revision=config.revision)
    except ConnectionError as error:
        if not datasets_config.HF_HUB_OFFLINE:
            raise
        raise ValueError(
            f"{description} is not in this machine's cache, and HF_HUB_OFFLINE is set: download it first, or "
            f"unset HF_HUB_OFFLINE ({error})"
        ) from None
    try:
        stream = builder.as_streaming_dataset(split=config.split)
    except ValueError as error:
        raise ValueError(f"{description}: {error}: set data.split") from error
    columns, there = _columns(config, rows), stream.column_names
    for name in columns.names if there is not None else ():
        if name not in there and name.split(".")[0] not in there and name not in columns.optional:
            setting = "data.text_column" if rows is None else f"the columns of data.rows={config.rows}"
            raise ValueError(f"{description} has no column {name!r}, it has {there}: set {setting}")
    shards = stream.num_shards
    # builder.hash is the commit for a dataset of the hub.
    identity = [config.name, config.subset, config.split, builder.hash, shards]
    return Source(
        config.title,
        description,
        tuple(
            Shard(
                _key([reading, identity, shard]),
                (HubShard(config.name, config.subset, config.split, config.revision, shard, shards),),
                columns,
                rows,
                0,
            )
            for shard in range(shards)
        ),
    )
