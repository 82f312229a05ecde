"""Documents packed into one micro-batch's sequence, in the form in which Megatron-core hands them through a model.

Knows where documents begin and which tokens this rank holds. Does not know attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from dash_kernels import ChunkGrid


@dataclass(kw_only=True)
class PackedDocuments(PackedSeqParams):
    """Argument of the model's forward pass that reaches the rotary embedding and every core attention.

    Recomputation closes over it, so each micro-batch in flight under pipeline parallelism keeps its own.

    Attributes:
        chunks: chunks of all documents of the whole sequence, built once and used by all layers.
        positions: int32 [T / cp] on the rank's device, of this rank's tokens in shard order, each counted from the
            beginning of its document. The attention of a document depends on where its positions begin: scores between
            rotated queries and keys do not, but `summary_query`, which weighs the rotated keys of a chunk, is itself
            not rotated.
        qkv_format: tensors stay [s, b, heads, dim]; for "thd", Megatron-core would drop b and cut the rotary angles.
    """

    chunks: ChunkGrid
    positions: torch.Tensor
    qkv_format: str = "sbhd"


def packed_documents(
    cu_seqlens: torch.Tensor, shard_positions: torch.Tensor, device: torch.device, *, chunk_size: int
) -> PackedDocuments:
    """
    Args:
        cu_seqlens: of a `MicroBatch` that has been checked.
        shard_positions: int64 [T / cp] on the CPU, of this rank's tokens in the whole sequence.
        device: the rank's.
        chunk_size: tokens.
    """
    # Start of the document of each token of the whole sequence.
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    positions = (shard_positions - starts[shard_positions]).to(device, torch.int32)
    return PackedDocuments(chunks=ChunkGrid.packed(cu_seqlens.tolist(), chunk_size), positions=positions)
