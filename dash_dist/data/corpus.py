"""A prepared corpus: the tokens of every document of every source, by number.

Knows shards and their files; does not know where the documents came from nor their order. `corpora/FINGERPRINT/` in the
cache holds corpus.json, the list of shards, and the lengths of all documents in one file for each source, which the
processes of a machine share in memory.
"""

import functools
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from dash_dist.data.loss_spans import LossSpans
from dash_dist.data.sources import Source
from dash_dist.data.token_files import REMEDY, checked_lengths, open_dataset
from dash_dist.data.token_shard import read_counts
from dash_dist.run.files import read_json, write_json

_OPEN_SHARDS = 128  # each holds two file descriptors


@dataclass(frozen=True)
class SourceRecord:
    """One source of a corpus as corpus.json holds it.

    Attributes:
        shards: paths of the datasets, without .bin and .idx, relative to the cache where they are in it.
        documents: of each shard.
        digest: of all documents in order, wherever shards begin.
        named: the first damaged documents, with reasons.
        loss_tokens: tokens that count in the loss; None if all do.
    """

    title: str
    description: str
    shards: tuple[str, ...]
    documents: tuple[int, ...]
    tokens: int
    empty: int
    damaged: int
    named: tuple[str, ...]
    digest: str
    loss_tokens: int | None = None


class TokenSource:
    """The documents of one source. Document i is i places from the first, with or without tokens."""

    def __init__(self, record: SourceRecord, cache: Path, lengths: np.ndarray, end_of_document: int):
        self.record = record
        self.lengths = lengths
        """int32 [documents]: tokens of each document with its end-of-document token; 0 if empty or damaged."""
        self._cache = cache
        self._first = np.cumsum([0, *record.documents])
        self._end_of_document = end_of_document
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._open_spans = functools.lru_cache(_OPEN_SHARDS)(self._load_spans)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return tokens start to stop of a document, int64.

        Raises OSError or ValueError if the shard is no longer there or damaged.
        """
        shard, local = self._place(document)
        dataset, file = self._open(shard)
        own = int(self.lengths[document])
        ends = own - int(dataset.sequence_lengths[local])
        if ends not in (0, 1):
            raise ValueError(f"{file.name} is not the file that the run began with: start it again")
        item = np.dtype(dataset.index.dtype).itemsize
        stored = min(stop, own - ends)
        # Read and not mapped: a page fault would read far more than a short document.
        wanted, offset = (stored - start) * item, int(dataset.index.sequence_pointers[local]) + start * item
        data = os.pread(file.fileno(), wanted, offset)
        while 0 < len(data) < wanted and (more := os.pread(file.fileno(), wanted - len(data), offset + len(data))):
            data += more
        if len(data) != wanted:
            raise ValueError(f"{file.name} ends before document {local} does: {REMEDY}")
        tokens = np.frombuffer(data, dtype=dataset.index.dtype).astype(np.int64)
        return np.append(tokens, self._end_of_document) if stop > stored else tokens

    @property
    def is_masked(self) -> bool:
        """Return whether some tokens do not count in the loss."""
        return self.record.loss_tokens is not None

    def loss_mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens start to stop of a document count in the loss as labels, bool.

        Raises OSError or ValueError if the shard is no longer there or damaged.
        """
        if not self.is_masked:
            return np.ones(stop - start, dtype=bool)
        shard, local = self._place(document)
        return self._open_spans(shard).mask(local, start, stop)

    def count_loss_tokens(self, document: int, start: int, stop: int) -> int:
        """Return how many of the tokens start to stop of a document count in the loss. Raises as `loss_mask` does."""
        if not self.is_masked:
            return stop - start
        shard, local = self._place(document)
        return self._open_spans(shard).count(local, start, stop)

    def _place(self, document: int) -> tuple[int, int]:
        """Return the shard of a document, and its number there."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return shard, document - int(self._first[shard])

    def _load_spans(self, shard: int) -> LossSpans:
        return LossSpans((self._cache / self.record.shards[shard]).parent, self.record.documents[shard])

    def _open_shard(self, shard: int) -> tuple[IndexedDataset, IO[bytes]]:
        prefix = str(self._cache / self.record.shards[shard])
        return open_dataset(prefix), open(f"{prefix}.bin", "rb", buffering=0)


class Corpus:
    """A prepared corpus, opened by its fingerprint.

    Attributes:
        sources: by title, in the order of the configuration.
    """

    def __init__(self, cache: Path, fingerprint: str, end_of_document: int):
        self.fingerprint = fingerprint
        self.cache = cache
        folder = cache / "corpora" / fingerprint
        self.sources = {
            record.title: TokenSource(record, cache, _map(folder / f"lengths_{number}.bin"), end_of_document)
            for number, record in enumerate(_read_records(folder))
        }

    @property
    def damage(self) -> list[str]:
        """Return a sentence for each source with documents that cannot be read, naming the first of them."""
        told = []
        for title, source in self.sources.items():
            if damaged := source.record.damaged:
                more = f" and {damaged - 3} more" if damaged > 3 else ""
                told.append(
                    f"{title}: {damaged} of {len(source)} documents are skipped: "
                    f"{'; '.join(source.record.named[:3])}{more}"
                )
        return told


def record_corpus(
    cache: Path,
    sources: Sequence[Source],
    folder_of: dict[str, Path],
    *,
    end_of_document: int,
    reading: list[object],
) -> str:
    """Write corpus.json and the lengths of prepared sources; returns the corpus's fingerprint.

    Args:
        folder_of: folder of each shard, by key.
        reading: as in `open_source`: part of the fingerprint.

    Raises:
        ValueError: a dataset is damaged, or a source has no text.
    """
    building = cache / "corpora" / f".{uuid.uuid4().hex}"
    building.mkdir(parents=True)
    try:
        records = []
        for number, source in enumerate(sources):
            with open(building / f"lengths_{number}.bin", "wb") as lengths:
                if source.prefixes:
                    records.append(_record_datasets(source, lengths, end_of_document))
                else:
                    records.append(_record_shards(source, cache, folder_of, lengths))
            if not records[-1].tokens:
                reason = f": {records[-1].named[0]}" if records[-1].named else ""
                raise ValueError(f"{source.description} has no text{reason}")
        identity = [reading, [[one.title, one.digest, sum(one.documents), one.tokens] for one in records]]
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        write_json(building / "corpus.json", [asdict(one) for one in records])
        final = cache / "corpora" / fingerprint
        try:
            os.replace(building, final)
        except OSError:
            # There already, perhaps from another process just now. Its list of shards may be of files that have moved
            # since, or were cut otherwise.
            if not final.exists():
                raise
            for path in building.iterdir():
                os.replace(path, final / path.name)
        return fingerprint
    finally:
        if building.exists():
            for path in building.iterdir():
                path.unlink()
            building.rmdir()


def _record_shards(source: Source, cache: Path, folder_of: dict[str, Path], lengths: IO[bytes]) -> SourceRecord:
    digest = 0
    shards: list[str] = []
    documents: list[int] = []
    named: list[str] = []
    tokens = empty = damaged = 0
    loss_tokens: int | None = None
    for shard in source.shards:
        folder = folder_of[shard.key]
        counts = read_counts(folder)
        assert counts is not None  # prepared
        if not counts.documents:
            continue
        with np.load(folder / "documents.npz") as arrays:
            digest = zlib.crc32(arrays["damaged"].tobytes(), zlib.crc32(arrays["digest"].tobytes(), digest))
        if counts.tokens:
            lengths.write(checked_lengths(open_dataset(str(folder / "tokens"))).tobytes())
        else:
            lengths.write(bytes(4 * counts.documents))
        if counts.loss_tokens is not None:
            LossSpans(folder, counts.documents)  # whole
            loss_tokens = (loss_tokens or 0) + counts.loss_tokens
        shards.append(str((folder / "tokens").relative_to(cache)))
        documents.append(counts.documents)
        tokens, empty, damaged = tokens + counts.tokens, empty + counts.empty, damaged + counts.damaged
        named += counts.names(shard)
    return SourceRecord(
        source.title,
        source.description,
        tuple(shards),
        tuple(documents),
        tokens,
        empty,
        damaged,
        tuple(named[:20]),
        f"{digest:08x}",
        loss_tokens,
    )


def _record_datasets(source: Source, lengths: IO[bytes], end_of_document: int) -> SourceRecord:
    """Record datasets that Megatron-core's tools have written. They have no digests: lengths stand for the documents.

    The end-of-document token counts to the documents of a dataset that lacks it.
    """
    digest = tokens = empty = 0
    documents = []
    for prefix in source.prefixes:
        dataset = open_dataset(prefix)
        own = checked_lengths(dataset)
        if len(dataset.document_indices) != len(own) + 1:
            raise ValueError(
                f"{prefix} has {len(dataset.document_indices) - 1} documents in {len(own)} sequences: prepare it "
                "without splitting documents into sentences"
            )
        full = np.flatnonzero(own)
        sample = full[:: max(1, len(full) // 64)]
        ends = [int(dataset.get(int(i), offset=int(own[i]) - 1, length=1)[0]) == end_of_document for i in sample]
        lengths_with_end = own if all(ends) else own + (own > 0).astype(np.int32)
        if any(ends) != all(ends):
            raise ValueError(
                f"{prefix}: some documents end with token {end_of_document} and some do not: append it to all"
            )
        lengths.write(lengths_with_end.astype(np.int32).tobytes())
        digest = zlib.crc32(own.tobytes(), digest)
        tokens += int(lengths_with_end.sum(dtype=np.int64))
        empty += len(own) - len(full)
        documents.append(len(own))
    return SourceRecord(
        source.title, source.description, source.prefixes, tuple(documents), tokens, empty, 0, (), f"{digest:08x}"
    )


def changed_documents(corpus: Corpus, before: str, title_before: str, title: str) -> list[int] | None:
    """Return the documents of a source whose text differs from that of an earlier corpus with as many documents.

    Documents that were damaged before and are whole now do not count. None if the tokens of the corpus `before` are no
    longer in the cache, or without digests.
    """
    try:
        records = _read_records(corpus.cache / "corpora" / before)
        digests, damaged = _digests(corpus.cache, next(one for one in records if one.title == title_before))
        now, _ = _digests(corpus.cache, corpus.sources[title].record)
    except (OSError, ValueError):
        return None
    return [int(one) for one in np.flatnonzero((digests != now) & ~damaged)]


def _digests(cache: Path, record: SourceRecord) -> tuple[np.ndarray, np.ndarray]:
    digests, unread = [], []
    for shard in record.shards:
        with np.load((cache / shard).parent / "documents.npz") as arrays:
            digests.append(arrays["digest"])
            unread.append(arrays["damaged"])
    return np.concatenate(digests), np.concatenate(unread)


def _read_records(folder: Path) -> list[SourceRecord]:
    records: Any = read_json(folder / "corpus.json")
    if records is None:
        raise FileNotFoundError(f"{folder} is not there: data.cache must be the same folder at every rank of a node")
    lists = ("shards", "documents", "named")
    return [SourceRecord(**{**record, **{key: tuple(record[key]) for key in lists}}) for record in records]


def _map(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.int32, mode="r")
