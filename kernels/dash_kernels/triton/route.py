"""Stage 2 in Triton, forward (alpha = 1.5): exact thresholds by a few sweeps over the summaries, and the selection as a
bit per tile and chunk. No score leaves a program.

A sweep at t gives f(t) = sum (x - t)+^2 - 1, whose root is the threshold tau. The first sweeps need not be exact: a
guess from the mean and spread of a sample of the scores, then Newton steps on scores without the summaries' low part.
The guess is made too low on purpose: chunks below it for every row of the program cannot be selected, and only the
others are listed for the sweeps that follow. From there one exact sweep and the closed form on its support give tau,
and the next one proves it: the same support means the same, exact tau. A sweep below what the list was made for lists
all chunks again, so that the proof does not depend on how good the guess was.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from dash_kernels.chunks import ChunkGrid
from dash_kernels.listed_routing import listed_routing, tile_masks
from dash_kernels.spec import AttentionSpec, Routing
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.lists import work_counter
from dash_kernels.triton.tiles import (
    TileShape,
    load_rows,
    load_slot,
    resident_programs,
    routing_factor,
    routing_scores,
    split_summaries,
    summary_offset,
    tile_rows,
)

MAX_SWEEPS = tl.constexpr(16)
NEAR_ROOT = tl.constexpr(0.3)  # nearer than this in sum(p), the closed form is accurate enough to be a proof
SUM_TOLERANCE = tl.constexpr(5e-7)
# A Newton step of this many standard deviations of the scores leaves an error far below the distance of two scores.
SMALL_STEP = tl.constexpr(0.05)
MAX_NEWTON_STEPS = tl.constexpr(5)
SAMPLE = tl.constexpr(4)  # the guess looks at one block of summaries in SAMPLE, where there are many
# Float32 sums of head_dim products and what follows them are off by far less than this share of |q| |s|.
ROUNDING = 2.0**-15
STEP = tl.constexpr(512)  # places of the list that are looked at together


def route(q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec) -> Routing:
    batch, seq_len = q.shape[:2]
    n, kv_heads = summaries.shape[1:3]
    tile = TileShape.of(q, kv_heads, spec)
    masks = empty_masks(q, query_chunks, summaries, tile)
    tiles, words = masks.shape[2:]
    if spec.selection is not None:
        mark = functools.partial(tile_masks, tile_tokens=tile.tokens, per_chunk=tile.per_chunk)
        return listed_routing(q, query_chunks, summaries, spec, masks, mark)
    options = launch_options("route", q)
    # A program takes several tiles of a chunk: fewer reads of the summaries.
    together = 1
    while together * 2 * tile.tokens * tile.padded_group <= options.rows and tile.per_chunk % (together * 2) == 0:
        together *= 2
    tau = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    log_mean = torch.zeros(batch, seq_len, kv_heads, dtype=torch.float32, device=q.device)
    selected = torch.empty(batch, seq_len, kv_heads, dtype=torch.int32, device=q.device)
    high, low = split_summaries(summaries, q.dtype)
    work = tiles // together * batch * kv_heads
    programs = min(resident_programs(q.device, options.resident), work)
    # Of each program: two lists of chunks, and the words of a sweep.
    groups = together * tile.tokens * tile.padded_group // max(tile.padded_group, 16)
    row = 2 * n + -(-n // options.block) * groups * 4
    scratch = torch.empty(programs, row, dtype=torch.int32, device=q.device)
    route_kernel[(programs,)](
        q.contiguous(), query_chunks.on(q.device), high, low, rounding_errors(summaries, low), scratch,
        work_counter(q.device), tau, log_mean, selected, masks,
        seq_len, n, len(query_chunks), words, batch * kv_heads, row, routing_factor(spec),
        SUB=together, BN=options.block, HAS_SIGMA=spec.prior_sigma is not None, **tile.constants, **options.launch,
    )  # fmt: skip
    return Routing(tau, log_mean, selected, masks)


def mark_one(
    q: torch.Tensor, query_chunks: ChunkGrid, chosen: torch.Tensor, summaries: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    batch, n, kv_heads, _ = summaries.shape
    tile = TileShape.of(q, kv_heads, spec)
    masks = empty_masks(q, query_chunks, summaries, tile)
    held = chosen < n
    bits = torch.where(held, torch.ones_like(chosen) << (chosen % 32), 0)
    words = torch.where(held, chosen // 32, 0).long()
    shape = batch, kv_heads, len(query_chunks), tile.per_chunk, 1
    of_slots = masks.unflatten(2, shape[2:4])
    of_slots.scatter_(-1, words[:, None, None].expand(shape), bits[:, None, None].expand(shape))
    return masks


def empty_masks(q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, tile: TileShape) -> torch.Tensor:
    """Zeros for a bit per tile of queries and chunk of the sequence, int32 [B, Hkv, tiles, words]."""
    batch, n, kv_heads, _ = summaries.shape
    tiles, words = len(query_chunks) * tile.per_chunk, -(-n // 32)
    return torch.zeros(batch, kv_heads, tiles, words, dtype=torch.int32, device=q.device)


def rounding_errors(summaries: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Bound of |exact - rounded score| / |q| of each chunk, float32 [B, n, Hkv]: Cauchy's inequality on the low part,
    which the rounded scores leave out. Float32 scores are not rounded.
    """
    rounding = torch.linalg.vector_norm(summaries, dim=-1) * ROUNDING
    return rounding if low is summaries else rounding + torch.linalg.vector_norm(low.float(), dim=-1)


@triton.jit(do_not_specialize=["T", "n", "slots", "words", "batch_heads", "row"])
def route_kernel(
    q_ptr, grid_ptr, high_ptr, low_ptr, error_ptr, scratch_ptr, next_ptr, tau_ptr, log_mean_ptr, selected_ptr, mask_ptr,
    T, n, slots, words, batch_heads, row, factor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, SUB: tl.constexpr, BN: tl.constexpr, HAS_SIGMA: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BT * SUB
    STEPS: tl.constexpr = C // TOKENS
    M: tl.constexpr = TOKENS * GP
    GROUPS: tl.constexpr = M // max(GP, 16)
    list_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * row
    word_ptr = list_ptr + 2 * n
    work = tl.atomic_add(next_ptr, 1)  # handed out one by one: rows differ in length
    while work < slots * STEPS * batch_heads:
        batch_head = work // (slots * STEPS)
        program = slots * STEPS - 1 - work % (slots * STEPS)  # late chunks have the longest rows: they go first
        chunk, start, length, first = load_slot(grid_ptr, slots, program // STEPS)
        step = program % STEPS
        if step * TOKENS < length:
            _place, rows, real = tile_rows(start, length, step, batch_head, T, HQ, HK, G, GP, TOKENS)
            q = load_rows(q_ptr, rows, real, D, BD)
            available = chunk - first
            size = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1))
            error = size * _largest_error(error_ptr, first, available, batch_head, n, HK) * factor
            guess, reach, spread, lowest = _guess(
                q, high_ptr, low_ptr, first, available, batch_head, n, factor, HK, D, BD, BN
            )
            lowest -= 1.0 + error  # no threshold is below

            _list_all(list_ptr, first, available)
            now = 0  # which of the two lists
            places = available
            floor = tl.full([M], -float("inf"), tl.float32)  # no chunk left out has a score above it
            t = tl.where(real, tl.maximum(guess - reach, lowest), float("inf"))  # padding rows select nothing
            moving = tl.where(available > 0, 1, 0)
            sweep = 0
            while (moving > 0) & (sweep < MAX_NEWTON_STEPS):
                total, slope, _count, _routed, _log_sum = _sweep(
                    q, high_ptr, low_ptr, t, list_ptr + now * n, word_ptr, places, batch_head, n, factor,
                    HK, G, GP, TOKENS, D, BD, BN, GROUPS, False, False,
                )  # fmt: skip
                root = tl.sqrt(total)
                # Newton on sqrt(sum p) - 1, which is convex: from either side a step ends below the root.
                better = t + (root - 1.0) * root / slope
                better = tl.where(slope > 0, tl.maximum(better, lowest), lowest)
                # What is below t for the rounded scores is below the exact threshold if that is above t + error.
                if tl.max((real & (better < t + 2.0 * error)).to(tl.int32), axis=0) == 0:
                    other_ptr = list_ptr + (1 - now) * n
                    places = _shorten(list_ptr + now * n, other_ptr, word_ptr, places, BN, GROUPS)
                    now = 1 - now
                    floor = tl.maximum(floor, t + error)
                # The second sweep makes the final list: from below again, by more than the test above asks for.
                aside = 3.0 * error
                moving = tl.max((real & (tl.abs(better - t) > spread * SMALL_STEP + aside)).to(tl.int32), axis=0)
                t = tl.where(real, tl.where((sweep == 0) & (moving > 0), better - aside, better), float("inf"))
                sweep += 1

            place = tl.arange(0, TOKENS) + step * TOKENS
            token = ((batch_head // HK).to(tl.int64) * T + start + place) * HK + batch_head % HK
            low = tl.full([M], -float("inf"), tl.float32)
            high = tl.full([M], float("inf"), tl.float32)
            expected = tl.full([M], -1.0, tl.float32)
            sweep = 0
            passes = 1  # without an earlier chunk one empty pass writes what is known
            while passes > 0:
                if tl.max((t < floor).to(tl.int32), axis=0) > 0:
                    _list_all(list_ptr + now * n, first, available)
                    places = available
                    floor = tl.full([M], -float("inf"), tl.float32)
                total, slope, count, routed, log_sum = _sweep(
                    q, high_ptr, low_ptr, t, list_ptr + now * n, word_ptr, places, batch_head, n, factor,
                    HK, G, GP, TOKENS, D, BD, BN, GROUPS, True, HAS_SIGMA,
                )  # fmt: skip
                # Stored in the loop: carrying them out of it breaks Triton 3.6's compiler.
                tl.store(selected_ptr + token, routed + 1, mask=place < length)
                if HAS_SIGMA:
                    tl.store(log_mean_ptr + token, log_sum / tl.maximum(routed, 1), mask=place < length)
                done = (count == expected) | (tl.abs(total - 1.0) <= SUM_TOLERANCE) | (real == 0)
                sweep += 1
                open_rows = tl.where(available > 0, tl.sum((done == 0).to(tl.int32), axis=0), 0)
                passes = tl.where(sweep < MAX_SWEEPS, open_rows, 0)  # the last sweep's t is the one that was written
                new, new_low, new_high, new_expected = _next_threshold(t, low, high, lowest, total, slope, count)
                move = (done == 0) & (passes > 0)
                t = tl.where(move, new, t)
                low = tl.where(move, new_low, low)
                high = tl.where(move, new_high, high)
                expected = tl.where(move, new_expected, expected)
            tl.store(tau_ptr + rows, tl.where(available > 0, t, 0.0), mask=real)
            tile = batch_head.to(tl.int64) * slots * (C // BT) + program * SUB
            _write_selection(list_ptr + now * n, word_ptr, places, mask_ptr + tile * words, words, SUB, BN, GROUPS)
        work = tl.atomic_add(next_ptr, 1)


@triton.jit
def _largest_error(error_ptr, first, available, batch_head, n, HK: tl.constexpr):
    """Return the largest rounding error over the row's own chunks; other documents have no influence."""
    largest = tl.zeros([STEP], tl.float32)
    for at in range(0, available, STEP):
        place = at + tl.arange(0, STEP)
        offset = summary_offset(first + place, batch_head, n, HK, 1)
        largest = tl.maximum(largest, tl.load(error_ptr + offset, mask=place < available, other=0.0))
    return tl.max(largest, axis=0)


@triton.jit
def _guess(
    q, high_ptr, low_ptr, first, available, batch_head, n, factor,
    HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(threshold of as many normally distributed scores with the mean and spread of a sample, how far it may be off,
    spread, largest score of the sample).  [M] each
    """
    M: tl.constexpr = q.shape[0]
    total = tl.zeros([M, 4], tl.float32)
    square = tl.zeros([M, 4], tl.float32)
    top = tl.full([M, 4], -float("inf"), tl.float32)
    seen = 0
    for at in range(0, available, tl.where(available > 2 * SAMPLE * BN, SAMPLE * BN, BN)):
        inside = at + tl.arange(0, BN) < available
        y, _high = routing_scores(
            q, high_ptr, low_ptr, first + at + tl.arange(0, BN), inside, batch_head, n, HK, D, BD, False
        )
        seen += tl.minimum(available - at, BN)
        total += _fold(y)  # scores of absent chunks are zero
        square += _fold(y * y)
        y = tl.reshape(tl.where(inside[None, :], y, -float("inf")), [M, BN // 8, 4, 2])
        top = tl.maximum(top, tl.max(tl.max(y, axis=1), axis=2))
    sample = tl.maximum(seen, 1).to(tl.float32)
    mean = tl.sum(total, axis=1) / sample * factor
    square = tl.sum(square, axis=1) / sample * factor * factor
    spread = tl.sqrt(tl.maximum(square - mean * mean, 1e-12))
    h = _threshold_of_normal_scores(tl.maximum(available, 1).to(tl.float32), spread)
    # Simulated on smooth inputs: the fewer chunks are selected, the less is known of the scores near the threshold.
    # In 95 % of the tiles no row's threshold is lower.
    reach = 0.15 + 0.12 * h * tl.maximum(h, 0.0)
    return mean + h * spread, reach * spread, spread, tl.max(top, axis=1) * factor


@triton.jit
def _threshold_of_normal_scores(many, spread):
    """Threshold of `many` scores if they were normal, in units of their spread, from their mean: many spread^2 psi(h)
    = 1, where psi(h) = E[(X - h)+^2] of a standard normal X; Newton's method on log psi from a rough start.
    """
    goal = -tl.log(many * spread * spread)
    h = tl.sqrt(tl.maximum(-2.0 * goal, 0.0)) * 0.6 - 0.3
    for _ in tl.static_range(4):
        density = tl.exp(-0.5 * h * h) * 0.3989423
        tail = 0.5 * (1.0 - tl.erf(h * 0.70710678))
        psi = tl.maximum((1.0 + h * h) * tail - h * density, 1e-12)
        slope = tl.minimum(-2.0 * (density - h * tail), -1e-12)
        h = tl.minimum(tl.maximum(h - (tl.log(psi) - goal) * psi / slope, -4.0), 4.0)
    return h


@triton.jit
def _fold(x):
    """[M, BN] -> [M, 4]: sums over the columns of a thread in a matrix product's layout, those of a row's four threads
    kept apart: adding them up for every block would cost more than all else.
    """
    # Hopper: a row's 8 neighbouring columns lie in 4 threads, 2 each.
    return tl.sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2]), axis=1), axis=2)


@triton.jit
def _sweep(
    q, high_ptr, low_ptr, t, list_ptr, word_ptr, places, batch_head, n, factor,
    HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, GROUPS: tl.constexpr, EXACT: tl.constexpr, HAS_SIGMA: tl.constexpr,
):  # fmt: skip
    """(sum p [M], sum sqrt(p) [M]) at t of the listed chunks, and for EXACT scores (how many are above t [M], how many
    chunks a token selects [TOKENS], with HAS_SIGMA its sum of log P [TOKENS]). Writes which chunks are above t for any
    row of a group, int32 [blocks, GROUPS, 4]: bit 2 j + e of word i is for place 8 j + 2 i + e of the block.
    """
    M: tl.constexpr = q.shape[0]
    # Hopper: 8 columns, 4 threads, 2 columns each is the fragment layout, as in `_fold`.
    tl.static_assert(BN <= 64)  # a thread's share of a row's bits is a word's lower half
    column = tl.arange(0, BN)
    bit = 1 << (column // 8 * 2 + column % 2)
    words_at = tl.arange(0, GROUPS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    total = tl.zeros([M, 4], tl.float32)
    slope = tl.zeros([M, 4], tl.float32)
    count = tl.zeros([M, 4], tl.int32)
    routed = tl.zeros([TOKENS, 4], tl.int32)
    log_sum = tl.zeros([TOKENS], tl.float32)
    ids = tl.load(list_ptr + column, mask=column < places, other=0)
    for at in range(0, places, BN):
        inside = at + column < places
        y, _high = routing_scores(q, high_ptr, low_ptr, ids, inside, batch_head, n, HK, D, BD, EXACT)
        # A step ahead: loads whose addresses come from a load of the same step are not fetched in advance.
        ids = tl.load(list_ptr + at + BN + column, mask=at + BN + column < places, other=0)
        below = tl.where(inside[None, :], t[:, None] - y * factor, float("inf"))
        root = tl.minimum(below, 0.0)  # - sqrt(p)
        squares = root * root
        total += _fold(squares)
        slope -= _fold(root)
        sign = below.to(tl.int32, bitcast=True) >> 31  # all bits of a score above t
        word = _fold(sign & bit[None, :])
        if EXACT:
            count += _bits_set(word)
            routed += _bits_set(tl.reduce_or(tl.reshape(word, [TOKENS, GP, 4]), axis=1))
            if HAS_SIGMA:
                prior = tl.sum(tl.reshape(squares, [TOKENS, GP, BN]), axis=1) / G
                log_sum += tl.sum(tl.log(tl.where(prior > 0, prior, 1.0)), axis=1)
        word = tl.reduce_or(tl.reshape(word, [GROUPS, M // GROUPS, 4]), axis=1)
        tl.store(word_ptr + at // BN * GROUPS * 4 + words_at, word)
    tl.debug_barrier()  # other threads read the words
    total, slope = tl.sum(total, axis=1), tl.sum(slope, axis=1)
    return total, slope, tl.sum(count, axis=1).to(tl.float32), tl.sum(routed, axis=1), log_sum


@triton.jit
def _bits_set(word):
    """Number of bits set in each of the lower 16."""
    word = (word & 0x5555) + ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word & 0x0F0F) + ((word >> 4) & 0x0F0F)
    return (word & 0xFF) + (word >> 8)


@triton.jit
def _list_all(list_ptr, first, available):
    """Writes the ids of all chunks."""
    for at in range(0, available, STEP):
        place = at + tl.arange(0, STEP)
        tl.store(list_ptr + place, first + place, mask=place < available)
    tl.debug_barrier()


@triton.jit
def _hits(word_ptr, place, inside, begin, COUNT: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr):
    """1 where a listed chunk is above the threshold for any row of COUNT groups from `begin`, see `_sweep`."""
    column = place % BN
    at = word_ptr + place // BN * GROUPS * 4 + begin * 4 + column % 8 // 2
    word = tl.load(at, mask=inside, other=0)
    for group in tl.static_range(1, COUNT):
        word |= tl.load(at + group * 4, mask=inside, other=0)
    return (word >> (column // 8 * 2 + column % 2)) & 1


@triton.jit
def _shorten(list_ptr, kept_ptr, word_ptr, places, BN: tl.constexpr, GROUPS: tl.constexpr):
    """Writes the list of those chunks that the last sweep found above t for any row; returns their number."""
    count = 0
    for at in range(0, places, STEP):
        place = at + tl.arange(0, STEP)
        inside = place < places
        ids = tl.load(list_ptr + place, mask=inside, other=0)
        keep = _hits(word_ptr, place, inside, 0, GROUPS, BN, GROUPS)
        tl.store(kept_ptr + count + tl.cumsum(keep, axis=0) - keep, ids, mask=keep > 0)
        count += tl.sum(keep, axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _write_selection(
    list_ptr, word_ptr, places, mask_ptr, words, SUB: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr
):
    """Sets the bits of the chunks that the last sweep selected for each of SUB tiles."""
    for at in range(0, places, STEP):
        place = at + tl.arange(0, STEP)
        inside = place < places
        ids = tl.load(list_ptr + place, mask=inside, other=0)
        for tile in tl.static_range(SUB):
            hit = _hits(word_ptr, place, inside, tile * (GROUPS // SUB), GROUPS // SUB, BN, GROUPS)
            tl.atomic_or(mask_ptr + tile * words + ids // 32, hit << (ids % 32), mask=hit > 0, sem="relaxed")
    tl.debug_barrier()  # the list is written anew for the next tiles


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
