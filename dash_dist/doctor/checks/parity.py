"""The canary: context parallelism on and off must be the same function, forward and backward.

In float64, where only a wrong plan, a lost message or a wrong gradient makes a difference: rounding is 1e-12 at most,
and 1e-10 is allowed. Every exchange, with one document and with packed ones, in the zigzag layout.
"""

import itertools

import torch
import torch.distributed as dist

from dash_dist import dash_attention, join_sequence, split_sequence
from dash_dist.doctor.findings import Check, Finding, Where, failure, ok
from dash_dist.doctor.site import Site

_EXCHANGES = ("selective", "allgather", "ring")
_CHUNK = 16
_CHUNKS_PER_RANK = 4
_ROUTING_SCALE = 64.0
"""Sharp enough that many chunks are not selected and do not travel."""
_THRESHOLD = 1e-10
_NAMES = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of summary_query")
_ADVICE = (
    "Do not train with context parallelism here: set parallel.context=1, and report the finding with the versions. "
    "If only one exchange is named, attention.exchange set to another one avoids it."
)


def canary(site: Site) -> list[Finding]:
    """One finding: the largest difference, or which exchanges differ in what."""
    gpu = dist.get_backend() == "nccl"
    name = f"CP on = CP off ({'NCCL' if gpu else 'gloo'})"
    device = torch.device("cuda", dist.get_rank()) if gpu else torch.device("cpu")
    size = dist.get_world_size()
    worst, wrong, density = 0.0, [], 1.0
    for bounds, exchange in itertools.product((None, _crossing_documents(size)), _EXCHANGES):
        differences, of_case = _differences(exchange, bounds, device)
        density = min(density, of_case)
        documents = "one document" if bounds is None else "packed documents"
        for what, difference in zip(_NAMES, differences, strict=True):
            worst = max(worst, difference)
            if not difference <= _THRESHOLD:  # a NaN too
                wrong.append(f"{exchange}, {documents}: {what} by {difference:.1e}")
    if wrong:
        shown = "; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else "")
        return [failure(name, f"{len(wrong)} differ over {size} ranks: {shown}", _ADVICE, worst)]
    text = f"{size} ranks, {len(_EXCHANGES)} exchanges, density {density:.2f}: outputs and gradients within {worst:.0e}"
    return [ok(name, text, worst)]


def _crossing_documents(size: int) -> list[int]:
    """Borders of documents of whole chunks, one of which crosses the middle, where the zigzag layout turns."""
    chunks = _CHUNKS_PER_RANK * size
    return [_CHUNK * at for at in (0, 1, chunks // 2 - 1, chunks - 1, chunks)]


def _differences(exchange: str, bounds: list[int] | None, device: torch.device) -> tuple[list[float], float]:
    """Largest absolute difference of each of `_NAMES` at any rank, inf for a NaN, and the density of the routing."""
    world = dist.group.WORLD
    seq_len = _CHUNK * _CHUNKS_PER_RANK * dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # the same at every rank
    shapes = ((1, seq_len, 4, 16), (1, seq_len, 2, 16), (1, seq_len, 2, 16), (2, 16))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator, dtype=torch.float64).to(device)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    whole = [x.clone().requires_grad_() for x in inputs]
    expected, routing = dash_attention(
        *whole, chunk_size=_CHUNK, routing_scale=_ROUTING_SCALE, cu_seqlens=cu_seqlens, return_routing=True
    )
    expected_gradients = torch.autograd.grad(expected, whole, upstream)

    q, k, v = (split_sequence(x, world).contiguous().requires_grad_() for x in inputs[:3])
    query = inputs[3].clone().requires_grad_()
    out = dash_attention(
        q,
        k,
        v,
        query,
        chunk_size=_CHUNK,
        routing_scale=_ROUTING_SCALE,
        cu_seqlens=cu_seqlens,
        cp_group=world,
        exchange=exchange,
    )
    *of_shards, of_query = torch.autograd.grad(out, [q, k, v, query], split_sequence(upstream, world))
    dist.all_reduce(of_query)
    got = [*(join_sequence(x.detach(), world) for x in (out, *of_shards)), of_query]

    worst = torch.stack(
        [(a - b.detach()).abs().max() for a, b in zip(got, [expected, *expected_gradients], strict=True)]
    ).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist(), float(routing.density)


CHECKS = (
    Check("CP on = CP off (gloo)", canary, Where.RANKS, _ADVICE),
    Check("CP on = CP off (NCCL)", canary, Where.GPU_RANKS, _ADVICE),
)
