"""Rotation of heads in Triton: one pass that reads any view of heads and writes any other."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_ROWS = 16
"""Tokens of a program, which loads their angles once for all heads of its group."""


def turn(
    source: torch.Tensor,
    target: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    *,
    back: bool,
) -> None:
    """Write `source` [B, T, N, M, D], rotated, into `target`, see `dash_kernels.rotary`."""
    batch, tokens, outer, inner, head_dim = source.shape
    turns = cosines is not None
    from_batch, from_token, from_outer, from_inner, _ = source.stride()
    to_batch, to_token, to_outer, to_inner, _ = target.stride()
    half = head_dim // 2
    # A sequence's length changes the strides of the batch alone; the others are compiled in.
    turn_kernel[(triton.cdiv(tokens, _ROWS), batch * outer)](
        source, target, cosines if turns else source, sines if turns else source, tokens, from_batch, to_batch,
        FROM_TOKEN=from_token, FROM_OUTER=from_outer, FROM_INNER=from_inner,
        TO_TOKEN=to_token, TO_OUTER=to_outer, TO_INNER=to_inner, OUTER=outer, INNER=inner,
        HALF=half, BH=triton.next_power_of_2(half), ALIGNED=math.gcd(half, from_batch, to_batch, 16), ROWS=_ROWS,
        TURNS=turns, BACK=back,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "from_batch", "to_batch"])
def turn_kernel(
    source_ptr, target_ptr, cos_ptr, sin_ptr, T, from_batch, to_batch,
    FROM_TOKEN: tl.constexpr, FROM_OUTER: tl.constexpr, FROM_INNER: tl.constexpr,
    TO_TOKEN: tl.constexpr, TO_OUTER: tl.constexpr, TO_INNER: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    HALF: tl.constexpr, BH: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    TURNS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = (tl.program_id(1) // OUTER).to(tl.int64)
    group = (tl.program_id(1) % OUTER).to(tl.int64)
    column = tl.arange(0, BH)
    mask = (token < T)[:, None] & (column < HALF)[None, :]
    if TURNS:
        angle = token[:, None] * HALF + column[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        if BACK:
            sin = -sin
    start = tl.multiple_of(batch * from_batch, ALIGNED) + group * FROM_OUTER
    source = source_ptr + start + token[:, None] * FROM_TOKEN + column[None, :]
    start = tl.multiple_of(batch * to_batch, ALIGNED) + group * TO_OUTER
    target = target_ptr + start + token[:, None] * TO_TOKEN + column[None, :]
    for _head in range(INNER):
        first = tl.load(source, mask=mask, other=0.0)
        second = tl.load(source + HALF, mask=mask, other=0.0)
        if TURNS:
            wide, other = first.to(tl.float32), second.to(tl.float32)
            first = (wide * cos - other * sin).to(first.dtype)
            second = (other * cos + wide * sin).to(second.dtype)
        tl.store(target, first, mask=mask)
        tl.store(target + HALF, second, mask=mask)
        source += FROM_INNER
        target += TO_INNER
