"""Streams over small corpora, and the sequences of their steps put together again."""

from typing import Any

import torch

from dash_dist.config.data import DataConfig
from dash_dist.data.stream import Batch, DataStream, build_data_stream
from dash_dist.data.tokenizer import ByteTokenizer

# From one byte to many windows of the lengths the tests use.
LENGTHS = (1, 70, 3, 15, 16, 17, 200, 2, 31, 64, 5)
CHUNK_SIZE = 4
TEXTS = [f"{i:x}" * length for i, length in enumerate(LENGTHS)]


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


def steps(stream: DataStream, count: int) -> list[torch.Tensor]:
    return [join(stream.next_step()) for _ in range(count)]
