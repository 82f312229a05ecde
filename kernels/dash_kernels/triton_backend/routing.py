"""Stage 2 in Triton, forward (alpha = 1.5): exact thresholds by a few sweeps over the summaries, and the selection as a
bit per tile and chunk. No score leaves a program.

A sweep at t gives f(t) = sum (x - t)+^2 - 1, whose root is the threshold tau. The first sweeps need not be exact: a
guess from the mean and spread of a sample of the scores, then Newton steps on scores without the summaries' low part.
From there one exact sweep and the closed form on its support give tau, and the next one, which also writes the
selection, proves it: the same support means the same, exact tau.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, Routing
from dash_kernels.triton_backend.launch import launch_options
from dash_kernels.triton_backend.tiles import (
    TileShape,
    load_rows,
    load_slot,
    routing_factor,
    routing_scores,
    split_summaries,
    tile_rows,
)

MAX_SWEEPS = tl.constexpr(16)
NEAR_ROOT = tl.constexpr(0.3)  # nearer than this in sum(p), the closed form is accurate enough to be a proof
SUM_TOLERANCE = tl.constexpr(5e-7)
# A Newton step of this many standard deviations of the scores leaves an error far below the distance of two scores.
SMALL_STEP = tl.constexpr(0.05)
MAX_NEWTON_STEPS = tl.constexpr(5)
SAMPLE = tl.constexpr(4)  # the guess looks at one block of summaries in SAMPLE, where there are many


def route(q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec) -> Routing:
    batch, seq_len = q.shape[:2]
    n, kv_heads = summaries.shape[1:3]
    tile = TileShape.of(q, kv_heads, spec)
    options = launch_options("route", q)
    # A program takes several tiles of a chunk: fewer reads of the summaries.
    together = 1
    while together * 2 * tile.tokens * tile.padded_group <= options.rows and tile.per_chunk % (together * 2) == 0:
        together *= 2
    tau = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    log_mean = torch.zeros(batch, seq_len, kv_heads, dtype=torch.float32, device=q.device)
    selected = torch.empty(batch, seq_len, kv_heads, dtype=torch.int32, device=q.device)
    tiles, words = len(query_chunks) * tile.per_chunk, -(-n // 32)
    masks = torch.empty(batch, kv_heads, tiles, words, dtype=torch.int32, device=q.device)
    route_kernel[(tiles // together, batch * kv_heads)](
        q.contiguous(), query_chunks.on(q.device), *split_summaries(summaries, q.dtype), tau, log_mean, selected, masks,
        seq_len, n, len(query_chunks), words, routing_factor(spec),
        SUB=together, BN=options.block, HAS_SIGMA=spec.prior_sigma is not None, **tile.constants, **options.launch,
    )  # fmt: skip
    return Routing(tau, log_mean, selected, masks)


@triton.jit(do_not_specialize=["T", "n", "slots", "words"])
def route_kernel(
    q_ptr, grid_ptr, high_ptr, low_ptr, tau_ptr, log_mean_ptr, selected_ptr, mask_ptr, T, n, slots, words, factor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, SUB: tl.constexpr, BN: tl.constexpr, HAS_SIGMA: tl.constexpr,
):  # fmt: skip
    # Late chunks have the longest rows: they start first.
    program, batch_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    TOKENS: tl.constexpr = BT * SUB
    STEPS: tl.constexpr = C // TOKENS
    M: tl.constexpr = TOKENS * GP
    chunk, start, length, first = load_slot(grid_ptr, slots, program // STEPS)
    step = program % STEPS
    if step * TOKENS < length:
        _place, rows, real = tile_rows(start, length, step, batch_head, T, HQ, HK, G, GP, TOKENS)
        q = load_rows(q_ptr, rows, real, D, BD)
        available = chunk - first
        begin = tl.where(available > 0, first // BN * BN, chunk)

        # A guess: the threshold of as many normally distributed scores with the mean and spread of a sample.
        seen = tl.zeros([BN], tl.float32)
        total = tl.zeros([M], tl.float32)
        square = tl.zeros([M], tl.float32)
        for at in range(begin, chunk, tl.where(available > 2 * SAMPLE * BN, SAMPLE * BN, BN)):
            ids = at + tl.arange(0, BN)
            inside = (ids >= first) & (ids < chunk)
            y, _high = routing_scores(q, high_ptr, low_ptr, ids, inside, batch_head, n, HK, D, BD, False)
            seen += inside.to(tl.float32)
            total += tl.sum(y, axis=1)  # scores of absent chunks are zero
            square += tl.sum(y * y, axis=1)
        sample = tl.maximum(tl.sum(seen, axis=0), 1.0)
        mean = total / sample * factor
        spread = tl.sqrt(tl.maximum(square / sample * factor * factor - mean * mean, 1e-12))
        many = tl.maximum(available, 1).to(tl.float32)
        t = _threshold_of_normal_scores(many, mean, spread)

        top = tl.zeros([M], tl.float32)
        moving = tl.where(available > 0, 1, 0)
        sweep = 0
        while (moving > 0) & (sweep < MAX_NEWTON_STEPS):
            top = tl.full([M], -float("inf"), tl.float32)
            total = tl.zeros([M], tl.float32)
            slope = tl.zeros([M], tl.float32)
            for at in range(begin, chunk, BN):
                ids = at + tl.arange(0, BN)
                inside = (ids >= first) & (ids < chunk)
                y, _high = routing_scores(q, high_ptr, low_ptr, ids, inside, batch_head, n, HK, D, BD, False)
                y = tl.where(inside[None, :], y, -float("inf"))
                top = tl.maximum(top, tl.max(y, axis=1))
                above = tl.maximum(y * factor - t[:, None], 0.0)
                total += tl.sum(above * above, axis=1)
                slope += tl.sum(above, axis=1)
            top = top * factor
            root = tl.sqrt(total)
            better = t + (root - 1.0) * root / slope  # Newton on sqrt(sum p) - 1; NaN where t lies above all scores
            better = tl.where((better >= top - 1.0) & (better <= top), better, top - 1.0)
            moving = tl.max((real & (tl.abs(better - t) > spread * SMALL_STEP)).to(tl.int32), axis=0)
            t = better
            sweep += 1

        lowest = top - 1.0
        total = tl.zeros([M], tl.float32)
        slope = tl.zeros([M], tl.float32)
        count = tl.zeros([M], tl.float32)
        for at in range(begin, chunk, BN):
            ids = at + tl.arange(0, BN)
            inside = (ids >= first) & (ids < chunk)
            y, _high = routing_scores(q, high_ptr, low_ptr, ids, inside, batch_head, n, HK, D, BD, True)
            above = tl.maximum(tl.where(inside[None, :], y, -float("inf")) * factor - t[:, None], 0.0)
            total += tl.sum(above * above, axis=1)
            slope += tl.sum(above, axis=1)
            count += tl.sum((above > 0).to(tl.float32), axis=1)
        low = tl.full([M], -float("inf"), tl.float32)
        high = tl.full([M], float("inf"), tl.float32)
        t, low, high, expected = _next_threshold(t, low, high, lowest, total, slope, count)
        t = tl.where(real, t, float("inf"))  # padding rows select nothing

        place = tl.arange(0, TOKENS) + step * TOKENS
        token = ((batch_head // HK).to(tl.int64) * T + start + place) * HK + batch_head % HK
        tile = (batch_head.to(tl.int64) * slots * (C // BT)) + program * SUB + tl.arange(0, SUB)
        # Padding rows are done. Without an earlier chunk one empty pass writes what is known.
        open_rows = tl.where(available > 0, M, 0)
        sweep = 0
        passes = 1
        while (passes > 0) & (sweep < MAX_SWEEPS):
            total = tl.zeros([M], tl.float32)
            slope = tl.zeros([M], tl.float32)
            count = tl.zeros([M], tl.float32)
            routed = tl.zeros([TOKENS], tl.int32)
            log_sum = tl.zeros([TOKENS], tl.float32)
            for at in range(begin, chunk, BN):
                ids = at + tl.arange(0, BN)
                inside = (ids >= first) & (ids < chunk)
                y, _high = routing_scores(q, high_ptr, low_ptr, ids, inside, batch_head, n, HK, D, BD, True)
                above = tl.maximum(tl.where(inside[None, :], y, -float("inf")) * factor - t[:, None], 0.0)
                squares = above * above
                total += tl.sum(squares, axis=1)
                slope += tl.sum(above, axis=1)
                count += tl.sum((above > 0).to(tl.float32), axis=1)
                prior = tl.sum(tl.reshape(squares, [TOKENS, GP, BN]), axis=1)  # G times the prior
                hit = (prior > 0).to(tl.int32)
                routed += tl.sum(hit, axis=1)
                if HAS_SIGMA:
                    log_sum += tl.sum(tl.log(tl.where(prior > 0, prior / G, 1.0)), axis=1)
                by_tile = tl.max(tl.reshape(hit, [SUB, BT, BN]), axis=1) << (tl.arange(0, BN) % 32)[None, :]
                word = at // 32 + tl.arange(0, BN // 32)
                tl.store(
                    mask_ptr + tile[:, None] * words + word[None, :],
                    tl.sum(tl.reshape(by_tile, [SUB, BN // 32, 32]), axis=2),
                    mask=(word < words)[None, :],
                )
            # Stored in the loop: carrying them out of it breaks Triton 3.6's compiler.
            tl.store(selected_ptr + token, routed + 1, mask=place < length)
            if HAS_SIGMA:
                tl.store(log_mean_ptr + token, log_sum / tl.maximum(routed, 1), mask=place < length)
            done = (count == expected) | (tl.abs(total - 1.0) <= SUM_TOLERANCE) | (real == 0)
            open_rows = tl.where(available > 0, tl.sum((done == 0).to(tl.int32), axis=0), 0)
            sweep += 1
            passes = tl.where(sweep < MAX_SWEEPS, open_rows, 0)  # the last sweep's t is the one that was written
            new, new_low, new_high, new_expected = _next_threshold(t, low, high, lowest, total, slope, count)
            move = (done == 0) & (passes > 0)
            t = tl.where(move, new, t)
            low = tl.where(move, new_low, low)
            high = tl.where(move, new_high, high)
            expected = tl.where(move, new_expected, expected)
        tl.store(tau_ptr + rows, tl.where(available > 0, t, 0.0), mask=real)


@triton.jit
def _threshold_of_normal_scores(many, mean, spread):
    """Threshold of `many` scores if they were normal: many spread^2 psi((t - mean) / spread) = 1, where
    psi(h) = E[(X - h)+^2] of a standard normal X; Newton's method on log psi from a rough start.
    """
    goal = -tl.log(many * spread * spread)
    h = tl.sqrt(tl.maximum(-2.0 * goal, 0.0)) * 0.6 - 0.3
    for _ in tl.static_range(4):
        density = tl.exp(-0.5 * h * h) * 0.3989423
        tail = 0.5 * (1.0 - tl.erf(h * 0.70710678))
        psi = tl.maximum((1.0 + h * h) * tail - h * density, 1e-12)
        slope = tl.minimum(-2.0 * (density - h * tail), -1e-12)
        h = tl.minimum(tl.maximum(h - (tl.log(psi) - goal) * psi / slope, -4.0), 4.0)
    return mean + h * spread


@triton.jit
def _next_threshold(t, low, high, lowest, total, slope, count):
    """(next t, bracket, support it is exact for or -1) from a sweep's sums at t: the closed form on the support found,
    Halley's step where it has no solution, bisection where a step leaves the bracket. See dash_kernels.entmax.
    """
    excess = total - 1.0
    low = tl.where(excess > 0, t, low)
    high = tl.where(excess < 0, t, high)
    discriminant = slope * slope - count * excess
    closed = excess / (slope + tl.sqrt(tl.maximum(discriminant, 0.0)))
    halley = 2.0 * excess * slope / (4.0 * slope * slope - count * excess)
    proposal = t + tl.where(discriminant >= 0, closed, halley)
    inside = (proposal >= low) & (proposal <= high) & (count > 0)  # false for NaN as well
    # Halley's and Newton's steps climb to the root from anywhere below it.
    middle = tl.where((low > -float("inf")) & (high < float("inf")), 0.5 * (low + high), tl.minimum(lowest, t - 1.0))
    exact_for = tl.where(inside & (discriminant >= 0) & (tl.abs(excess) < NEAR_ROOT), count, -1.0)
    return tl.where(inside, proposal, middle), low, high, exact_for
