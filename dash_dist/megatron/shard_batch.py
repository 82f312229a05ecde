"""Micro-batches cut to this rank's shard of the sequence.

Knows layouts and packed documents. Does not know where batches come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dash_dist.context_parallel import shard_positions
from dash_dist.engine.batch import MicroBatch
from dash_dist.megatron.documents import PackedDocuments, packed_documents
from dash_dist.megatron.parallel import ParallelDims


@dataclass(frozen=True)
class ShardBatch:
    """One context-parallel rank's part of one micro-batch, [micro_batch_size, T / cp], on the rank's device.

    `documents` says which documents are packed into the whole sequence; None for one. `positions`, [T / cp], are those
    of the tokens in the sequence, or in their documents where there are several.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    documents: PackedDocuments | None
    positions: torch.Tensor


def split_micro_batches(
    micro_batches: Sequence[MicroBatch], dims: ParallelDims, *, layout: str, sequence_length: int, chunk_size: int
) -> list[ShardBatch]:
    """This rank's shards, in `shard_positions` order."""
    positions = shard_positions(sequence_length, dims.cp_rank, dims.cp_size, layout).cpu()
    in_sequence = positions.to(dims.device)
    shards = []
    for batch in micro_batches:
        documents = None
        if batch.cu_seqlens is not None:
            documents = packed_documents(batch.cu_seqlens, positions, dims.device, chunk_size=chunk_size)
        shards.append(
            ShardBatch(
                tokens=batch.tokens[:, positions].to(dims.device, torch.int64),
                labels=batch.labels[:, positions].to(dims.device, torch.int64),
                loss_mask=batch.loss_mask[:, positions].to(dims.device, torch.bool),
                documents=documents,
                positions=in_sequence if documents is None else documents.positions,
            )
        )
    return shards
