"""Streams over small corpora, and the sequences of their steps put together again."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dash_dist.config.data import DataConfig
from dash_dist.data.order import permute
from dash_dist.data.prepare import prepare_here
from dash_dist.data.stream import Batch, DataStream, build_data_stream
from dash_dist.data.tokenizer import ByteTokenizer

# From one byte to many windows of the lengths the tests use.
LENGTHS = (1, 70, 3, 15, 16, 17, 200, 2, 31, 64, 5)
FORMATS = ("text", "jsonl", "parquet", "hub")
CHUNK_SIZE = 4
TEXTS = [f"{i:x}" * length for i, length in enumerate(LENGTHS)]
END = ByteTokenizer.end_of_document


def files(*paths: Any, **options: Any) -> DataConfig:
    return DataConfig(source="files", paths=tuple(str(path) for path in paths), **options)


def source_of(lengths) -> SimpleNamespace:
    """A source without files."""
    lengths = np.array(lengths, dtype=np.int32)

    class Source(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.lengths)

    return Source(lengths=lengths, record=SimpleNamespace(tokens=int(lengths.sum()), description="data.paths=[x]"))


def json_lines(*texts: str) -> bytes:
    """JSON Lines of the texts."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def build(
    config: DataConfig,
    *,
    length: int = 16,
    batch: int = 4,
    rank: int = 0,
    size: int = 1,
    micro: int = 1,
    tokenizer: Any = None,
) -> DataStream:
    return build_data_stream(
        config,
        tokenizer=tokenizer or ByteTokenizer(),
        sequence_length=length,
        global_batch_size=batch,
        dp_rank=rank,
        dp_size=size,
        micro_batch_size=micro,
        chunk_size=CHUNK_SIZE,
    )


def build_ranks(config: DataConfig, size: int, **options: Any) -> list[DataStream]:
    """The streams of all data-parallel ranks."""
    return [build(config, rank=rank, size=size, **options) for rank in range(size)]


def join(micro_batches: list[Batch]) -> torch.Tensor:
    """The windows of a step of joined documents, int64 [rows, T + 1]."""
    tokens = torch.cat([batch.tokens for batch in micro_batches])
    labels = torch.cat([batch.labels for batch in micro_batches])
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    return torch.cat([tokens, labels[:, -1:]], dim=1)


def join_all(micro_batches: list[Batch]) -> list[list[list[int]]]:
    """All that a step holds, row by row: tokens, labels, loss mask and cu_seqlens."""
    rows = []
    for batch in micro_batches:
        borders = [] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        for tokens, labels, mask in zip(batch.tokens, batch.labels, batch.loss_mask, strict=True):
            rows.append([tokens.tolist(), labels.tolist(), mask.tolist(), borders])
    return rows


def global_steps(ranks: list[DataStream], count: int) -> list[list[list[list[int]]]]:
    """All rows of `count` global batches, those of all ranks in order."""
    return [[row for rank in ranks for row in join_all(rank.next_step())] for _ in range(count)]


def steps(stream: DataStream, count: int) -> list[torch.Tensor]:
    return [join(stream.next_step()) for _ in range(count)]


def inputs(stream: DataStream, count: int) -> list[int]:
    """The input tokens of `count` steps of joined documents, in order."""
    return [token for window in steps(stream, count) for token in window[:, :-1].flatten().tolist()]


def text_of(stream: DataStream, count: int = 8) -> str:
    """The text of `count` steps of joined documents."""
    return ByteTokenizer().decode(np.array(inputs(stream, count)))


def documents_of(config: DataConfig) -> list[str]:
    """The documents with text of all prepared sources, in the order of the files."""
    found = []
    for source in prepare_here(config, ByteTokenizer()).sources.values():
        for document in np.flatnonzero(source.lengths):
            *tokens, end = source.read(document, 0, int(source.lengths[document])).tolist()
            assert end == END
            found.append(bytes(tokens).decode())
    return found


def saved(stream: DataStream) -> dict[str, Any]:
    """The position as a checkpoint holds it."""
    return json.loads(json.dumps(stream.state_dict()))


def resume(config: DataConfig, state: dict[str, Any], **options: Any) -> tuple[DataStream, list[str]]:
    """A new stream at a saved position, and the sentences about differences."""
    stream = build(config, **options)
    return stream, stream.load_state_dict(state)


def parts_of(lengths: Sequence[int], cut: int | None) -> list[tuple[int, int, int]]:
    """The plain reference of cut documents: (document, start, stop) of the first part of each, then of the others."""
    parts = []
    for document, length in enumerate(lengths):
        starts = list(range(0, length, cut or length or 1)) or [0]
        if len(starts) > 1 and starts[-1] == length - 1:
            del starts[-1]  # the last token joins the part before
        parts += [(document, *bounds) for bounds in zip(starts, [*starts[1:], length], strict=True)]
    return sorted(parts, key=lambda part: part[1] > 0)


def tokens_in_order(
    sources: list[list[bytes]], shares: list[float], count: int, *, seed: int | None, cut: int | None = None
) -> tuple[list[int], list[tuple[int, int, int, int]]]:
    """The plain reference of joined documents: at least `count` tokens, and (source, document, start, stop) as drawn.

    The next part is of the source that lacks most of its share; each source is permuted in each epoch.
    """
    tokens: list[int] = []
    drawn: list[tuple[int, int, int, int]] = []
    parts = [parts_of([len(document) + bool(document) for document in source], cut) for source in sources]
    places, given = [0] * len(sources), [0] * len(sources)
    while len(tokens) < count:
        total = sum(given) + 1
        lacking = [share * total - own for share, own in zip(shares, given, strict=True)]
        source = lacking.index(max(lacking))
        start = stop = 0
        while start == stop:  # empty ones are passed over
            epoch, place = divmod(places[source], len(parts[source]))
            if seed is not None:
                place = int(permute(np.array([place]), len(parts[source]), seed=seed, epoch=epoch)[0])
            document, start, stop = parts[source][place]
            places[source] += 1
        drawn.append((source, document, start, stop))
        tokens += [*sources[source][document], END][start:stop]
        given[source] += stop - start
    return tokens, drawn
