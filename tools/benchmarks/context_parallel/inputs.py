"""A rank's shard of a sequence, drawn piece by piece: no rank ever holds more than its shard and one piece.

The sequence is cut into 4 x size pieces, whatever the layout, and a piece's numbers depend on its index alone: layouts
cut the same sequence differently. Pieces are independent of each other. For "smooth" queries that means that the AR(1)
process over tokens starts anew at every piece, which at thousands of tokens a piece and a correlation length of about
a hundred changes nothing that is measured.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dash_dist.context_parallel.layout import pieces_of
from tools.benchmarks.common.inputs import DTYPES, SEED, Case, Inputs, make_inputs

PIECES = 4  # of a rank: what the finest layout cuts


def shard_inputs(case: Case, rank: int, size: int, layout: str, device: torch.device) -> Inputs:
    """The inputs of the tokens that a rank holds of a case's sequence; summary_query is the same at every rank."""
    piece = replace(case, seq_len=case.seq_len // (PIECES * size))
    dtype = DTYPES[case.dtype]
    tokens = case.seq_len // size

    def empty(heads: int) -> torch.Tensor:
        return torch.empty(1, tokens, heads, case.head_dim, dtype=dtype, device=device)

    q, k, v, grad = empty(case.query_heads), empty(case.kv_heads), empty(case.kv_heads), empty(case.query_heads)
    for place, index in enumerate(_pieces(rank, size, layout)):
        drawn = make_inputs(piece, device, SEED + 1 + index)
        held = slice(place * piece.seq_len, (place + 1) * piece.seq_len)
        for whole, part in ((q, drawn.q), (k, drawn.k), (v, drawn.v), (grad, drawn.grad)):
            whole[:, held] = part
    generator = torch.Generator(device).manual_seed(SEED)
    summary_query = torch.randn(case.kv_heads, case.head_dim, generator=generator, device=device, dtype=dtype)
    return Inputs(q, k, v, summary_query, grad)


def repeated(inputs: Inputs, sequences: int) -> Inputs:
    """A batch of so many copies of the sequence."""
    if sequences == 1:
        return inputs
    q, k, v, grad = (x.repeat(sequences, 1, 1, 1) for x in (inputs.q, inputs.k, inputs.v, inputs.grad))
    return Inputs(q, k, v, inputs.summary_query, grad)


def _pieces(rank: int, size: int, layout: str) -> list[int]:
    """The rank's PIECES of PIECES x size pieces, in shard order."""
    pieces, count = pieces_of(rank, size, layout)
    finer = PIECES * size // count
    return [piece * finer + part for piece in pieces for part in range(finer)]
