"""Device code of one step with a chunk's keys, for the kernels that walk lists of chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from dash_kernels.triton.tiles import routing_scores

NOTHING = tl.constexpr(-1.0e30)  # running maximum of a row that has met no key: finite, so that no difference is NaN


@triton.jit
def softmax_step(scores, v, top, total, out):
    """Adds keys with base-2 scores [M, BC] to a running softmax."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="tf32x3")
    return new_top, total, out


@triton.jit
def score_gradient(scores, grad, v, lse2, delta):
    """Gradient of the (natural) scores [M, BC] from base-2 scores; zero where a score is -inf."""
    weights = tl.exp2(scores - lse2[:, None])
    return weights * (tl.dot(grad, tl.trans(v), input_precision="tf32x3") - delta[:, None])


@triton.jit
def add_routing_gradient(
    dq, centred, q, high_ptr, low_ptr, ids, mask, batch_head, n, tau, factor, logit_scale,
    HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq [M, BD] plus the share of u (dp - ratio), `centred` [M, BN], through the scores of the chunks `ids` [BN]."""
    y, high = routing_scores(q, high_ptr, low_ptr, ids, mask, batch_head, n, HK, D, BD, True)
    dz = tl.where(mask[None, :], tl.maximum(y * factor - tau[:, None], 0.0), 0.0) * centred * logit_scale
    if q.dtype == tl.bfloat16:
        dq = tl.dot(dz.to(tl.bfloat16), high, dq)
    else:  # float16 has too small a range for dz
        dq = tl.dot(dz, high.to(tl.float32), dq, input_precision="tf32x3")
    return dq
