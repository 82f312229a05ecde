"""Gradients of keys and values: a program takes a chunk and gathers the queries that selected it, all heads of the
group, from a piece of the sequence.

So a chunk that every token selects is split, and its pieces are gathered in parallel; they are added to the gradient
in their order, each waiting for its turn, so that the result is the same bits in every run.

Stages 2 and 1 go backward in the same pass. A chunk's summary is s = sum_t w_t k_t, so x = q . s is the w-weighted sum
of the chunk's scores, and the gradient dz of a query's routing score reaches key t as w_t dz, in addition to the
attention's own gradient of the score. Only the weights' own gradient needs dz (q . k_t), summed over the queries: a
number per key.

dK and dV are accumulated transposed: K x Q products whose first factor comes from shared memory as it was loaded, where
the other order makes Triton transpose in registers and ptxas serialise every matrix instruction (docs/kernel-log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dash_kernels.chunks import ChunkGrid
from dash_kernels.gluon_sm90.launch import gather_options
from dash_kernels.spec import PRIOR_FLOOR, AttentionSpec, Blocks, OutputGradient, Part, Queries
from dash_kernels.triton.key_rows import KeyRows, load_own_keys
from dash_kernels.triton.key_steps import add_rows, add_to_chunk, own_gradient, wait_for_turn
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.lists import list_queries, query_bits, slab_slots
from dash_kernels.triton.summarize import summary_weights
from dash_kernels.triton.tiles import (
    LOG2_E,
    TileShape,
    load_slot,
    resident_programs,
    routing_factor,
    split_summaries,
    token_rows,
)


def key_gradient(
    queries: Queries,
    upstream: OutputGradient,
    ratio: torch.Tensor,
    part: Part | Blocks,
    summary_query: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, grad, chunks = queries.q.contiguous(), upstream.grad.contiguous(), queries.chunks
    summaries, routing = queries.summaries, queries.routing
    batch, n, kv_heads, _ = summaries.shape
    tile = TileShape.of(q, kv_heads, spec)
    options = launch_options("key_gradient", q)
    keys = KeyRows.of(part, summaries.shape, tile)
    work_of_part = _WorkOfPart.of(part, batch * kv_heads, q.device)
    # One share of the gradient of summary_query per chunk, summed in a fixed order.
    shares = torch.zeros(batch, n, kv_heads, tile.head_dim, dtype=torch.float32, device=q.device)
    split = split_summaries(summaries, q.dtype)
    per_slab, piece = slab_slots(len(chunks), tile, batch * kv_heads, n)
    padded_chunk = triton.next_power_of_2(spec.chunk_size)
    if tile.padded_dim > 128:
        padded_chunk = max(padded_chunk, 64)  # Triton 3.6 multiplies wide heads by narrower chunks wrongly on Hopper
    # No tile of a chunk's own here: a step takes the next queries of the list, as many as fill its rows.
    constants = tile.constants | {"BT": max(options.rows // tile.padded_group, 1)}
    in_pieces = keys.aligned and _aligned(q, grad) and routing.lists is None
    gathered = gather_options(q, tile, chunks) if in_pieces else None
    of_queries = (grad, q, chunks.on(q.device), chunks.slots_by_id(n, q.device))
    factors = (
        routing_factor(spec), spec.scale * LOG2_E.value, spec.prior_exponent, spec.scale, spec.routing_logit_scale,
        PRIOR_FLOOR,
    )  # fmt: skip
    for begin in range(0, len(chunks), per_slab):
        end = min(begin + per_slab, len(chunks))
        met = work_of_part.met_by(chunks, begin, end)
        if met == 0:
            continue
        slab = query_bits(queries, split, keys, begin, end, piece, spec)
        work = slab.pieces * met * work_of_part.rows
        programs = min(resident_programs(q.device, 1 if gathered else options.resident), work)
        # The next piece of work, then whose turn it is to add to each chunk.
        turns = torch.zeros(1 + met * work_of_part.rows, dtype=torch.int32, device=q.device)
        of_work = (
            work_of_part.table, summary_query.contiguous(), routing.tau, routing.log_mean, upstream.lse, upstream.delta,
            ratio, slab.words,
        )  # fmt: skip
        results = (turns, *work_of_part.dk_and_dv(spec.chunk_size), shares)
        sizes = (
            q.shape[1], keys.tokens, n, len(chunks), begin, end, piece, slab.pieces, met, work_of_part.slots,
            work_of_part.rows,
        )  # fmt: skip
        if gathered is not None:
            from dash_kernels.gluon_sm90.key_gradient import launch_gathered  # Gluon is not in every Triton

            launch_gathered(
                programs, of_queries, keys, of_work, results, sizes, factors, piece * spec.chunk_size, tile, gathered,
                has_sigma=spec.prior_sigma is not None,
            )  # fmt: skip
            continue
        tokens = torch.empty(programs, piece * spec.chunk_size, dtype=torch.int32, device=q.device)
        key_gradient_kernel[(programs,)](
            *of_queries, keys.k, keys.v, *of_work, tokens, *results, *sizes, *factors, BC=padded_chunk,
            HAS_SIGMA=spec.prior_sigma is not None, BLOCKS=keys.blocks, LISTED=routing.lists is not None, **constants,
            **options.launch,
        )  # fmt: skip
    return work_of_part.dkv, shares.sum((0, 1))


def _aligned(*tensors: torch.Tensor) -> bool:
    """Return whether rows can be copied 16 bytes at a time."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@dataclass(frozen=True)
class _WorkOfPart:
    """The chunks of a part as the kernel numbers them: `slots` in each of `rows`.

    Of a `Part`, slots of its grid in rows of batch x Hkv; of `Blocks`, all blocks in one row.
    table: int32 [4, slots] of `ChunkGrid.on`, or the addresses of the blocks.
    dkv:   the gradient, as the part is.
    """

    part: Part | Blocks
    table: torch.Tensor
    slots: int
    rows: int
    dkv: torch.Tensor

    @classmethod
    def of(cls, part: Part | Blocks, batch_heads: int, device: torch.device) -> _WorkOfPart:
        if isinstance(part, Blocks):
            dkv = torch.zeros(part.kv.shape, dtype=torch.float32, device=device)
            return cls(part, part.addresses, len(part.addresses), 1, dkv)
        dkv = torch.zeros(2, *part.k.shape, dtype=torch.float32, device=device)
        return cls(part, part.chunks.on(device), len(part.chunks), batch_heads, dkv)

    def met_by(self, chunks: ChunkGrid, begin: int, end: int) -> int:
        """Count the chunks of a row that the queries of slots begin to end may reach; later ones follow them all.

        Blocks are what some query asked for.
        """
        if isinstance(self.part, Blocks):
            return self.slots
        not_later = (self.part.chunks.ids <= chunks.ids[begin:end].max()).nonzero().flatten()
        return int(not_later[-1]) + 1 if len(not_later) else 0

    def dk_and_dv(self, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.part, Part):
            return self.dkv[0], self.dkv[1]
        rows = self.dkv.flatten(0, 2)
        return rows, rows[chunk_size:]


@triton.jit(
    do_not_specialize=[
        "T", "S", "n", "slots", "slab_begin", "slab_end", "piece_slots", "pieces", "met", "key_slots", "key_rows"
    ]
)  # fmt: skip
def key_gradient_kernel(
    grad_ptr, q_ptr, grid_ptr, query_slots_ptr, k_ptr, v_ptr, key_table_ptr, query_ptr, tau_ptr, log_mean_ptr, lse_ptr,
    delta_ptr, ratio_ptr, words_ptr, tokens_ptr, turns_ptr, dk_ptr, dv_ptr, share_ptr,
    T, S, n, slots, slab_begin, slab_end, piece_slots, pieces, met, key_slots, key_rows,
    factor, scale2, prior_exponent, scale, logit_scale, prior_floor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HAS_SIGMA: tl.constexpr, BLOCKS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BD)
    row = tl.arange(0, BT * GP)
    HALF: tl.constexpr = BT * GP // 16  # Hopper: a warp's fragment has 16 rows, of which a thread holds 2
    my_tokens_ptr = tokens_ptr + tl.program_id(0).to(tl.int64) * piece_slots * C
    piece_words = piece_slots * C // 32
    chunks = met * key_rows
    # Work is handed out in order, so a program that waits for its turn waits for a running one.
    work = tl.atomic_add(turns_ptr, 1)
    while work < pieces * chunks:
        piece = work // chunks
        key_row = work % chunks // met
        key_slot = work % met
        turn_ptr = turns_ptr + 1 + work % chunks
        begin = slab_begin + piece * piece_slots
        end = tl.minimum(begin + piece_slots, slab_end)
        batch_head, chunk, key_start, length = load_key_slot(key_table_ptr, key_slots, key_row, key_slot, n, C, BLOCKS)
        bits = words_ptr + (batch_head.to(tl.int64) * n + chunk) * pieces * piece_words + piece * piece_words
        count = list_queries(bits, grid_ptr, my_tokens_ptr, slots, begin, piece_words, C)
        own = tl.load(query_slots_ptr + chunk)
        own_here = (own >= begin) & (own < end)
        if own_here | (count > 0):
            k, v = load_own_keys(k_ptr, v_ptr, key_start, length, batch_head, S, HK, BC, D, BD, BLOCKS)
            query = tl.load(query_ptr + (batch_head % HK) * D + column, mask=column < D, other=0.0).to(tl.float32)
            summary_weight = summary_weights(k.to(tl.float32), query, scale, C, BC)
            dk = tl.zeros([BD, BC], tl.float32)
            dv = tl.zeros([BD, BC], tl.float32)
            # Reduced over the rows of a warp's fragment only: the last sum, over HALF x 8 rows, waits until the end.
            along = tl.zeros([HALF, 8, BC], tl.float32)
            if own_here:
                _chunk, start, own_length, _own_first = load_slot(grid_ptr, slots, own)
                dk, dv = own_gradient(
                    grad_ptr, q_ptr, lse_ptr, delta_ptr, k, v, dk, dv, start, own_length, batch_head, T, scale2,
                    HQ, HK, G, GP, BT, BC, D, BD,
                )  # fmt: skip
            # Read a step ahead: what the loads of the next step address must be at hand when they start.
            next_token = tl.load(my_tokens_ptr + row // GP, mask=row // GP < count, other=0)
            for at in range(0, count, BT):
                listed = at + row // GP
                real = (listed < count) & (row % GP < G)
                token = next_token
                next_token = tl.load(my_tokens_ptr + listed + BT, mask=listed + BT < count, other=0)
                rows = token_rows(token, row % GP, batch_head, T, HQ, HK, G)
                dk, dv, along = add_rows(
                    grad_ptr, q_ptr, tau_ptr, log_mean_ptr, lse_ptr, delta_ptr, ratio_ptr, k, v, summary_weight, dk, dv,
                    along, rows, token, real, listed < count, batch_head, T, factor, scale2, prior_exponent, scale,
                    logit_scale, prior_floor, HK, G, GP, BT, C, BC, D, BD, HAS_SIGMA, LISTED,
                )  # fmt: skip
            tl.debug_barrier()  # the list is written anew for the next chunk
            # Read again, so that neither keys nor addresses occupy registers during the loop.
            batch_head, chunk, key_start, length = load_key_slot(
                key_table_ptr, key_slots, key_row, key_slot, n, C, BLOCKS
            )
            add_to_chunk(
                k_ptr, query_ptr, dk_ptr, dv_ptr, share_ptr, turn_ptr, piece, summary_weight, dk, dv, along, chunk,
                key_start, length, batch_head, S, n, scale, logit_scale, HK, BC, D, BD, BLOCKS,
            )  # fmt: skip
        else:
            wait_for_turn(turn_ptr, piece)
        tl.debug_barrier()  # every thread's part is written before the next piece's turn
        tl.atomic_add(turn_ptr, 1)
        work = tl.atomic_add(turns_ptr, 1)


@triton.jit
def load_key_slot(table_ptr, key_slots, key_row, key_slot, n, C: tl.constexpr, BLOCKS: tl.constexpr):
    """(batch x HK + KV head, chunk id, start, length) of a chunk of `_WorkOfPart`."""
    if BLOCKS:
        address = tl.load(table_ptr + key_slot)
        batch_head = (address // n).to(tl.int32)
        chunk = (address % n).to(tl.int32)
        start = key_slot * 2 * C
        length = C + key_slot * 0  # not a constant in one variant and a tensor in the other
    else:
        batch_head = key_row
        chunk, start, length, _first = load_slot(table_ptr, key_slots, key_slot)
    return batch_head, chunk, start, length
