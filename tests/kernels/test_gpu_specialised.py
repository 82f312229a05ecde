"""The kernels with specialised warps against those without, which the other tests hold to the reference."""

import importlib
import math

import pytest
import torch

from dash_kernels import triton as triton_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.gluon_sm90.launch import gather_options, pair_options
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries
from dash_kernels.triton import lists
from dash_kernels.triton.tiles import TileShape
from tests.kernels.attention_inputs import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU: Gluon has no interpreter",
    ),
]

CHUNK = 64


def blocks_of(k: torch.Tensor, v: torch.Tensor, ids: range) -> Blocks:
    """Every third block missing."""
    batch, tokens, heads, _ = k.shape
    kv, addresses = [], []
    for at in range(batch * heads):
        for chunk in ids:
            if (chunk + at) % 3:
                place = at // heads, slice(chunk * CHUNK, (chunk + 1) * CHUNK), at % heads
                kv.append(torch.stack((k[place], v[place])))
                addresses.append(at * (tokens // CHUNK) + chunk)
    return Blocks(torch.stack(kv), torch.tensor(addresses, device=k.device))


@pytest.mark.parametrize(
    ("batch", "tokens", "query_heads", "kv_heads", "head_dim", "routing_scale", "prior_sigma", "slab_bytes"),
    [
        (1, 1024, 32, 8, 128, 1.0, None, 2**28),
        (2, 2048, 8, 4, 128, 4.0, 1.0, 2**28),
        (1, 4096, 32, 2, 128, 2.0, None, 2**28),
        (2, 1536, 16, 8, 64, 3.0, 0.5, 2**28),
        (1, 64, 8, 2, 128, 1.0, None, 2**28),
        (1, 20480, 16, 2, 128, 1.0, 1.0, 2**28),  # several pieces of a chunk's queries
        (1, 20480, 16, 2, 128, 1.0, 1.0, 2**20),  # several slabs
    ],
)
def test_specialised_warps_compute_what_others_do(
    monkeypatch, batch, tokens, query_heads, kv_heads, head_dim, routing_scale, prior_sigma, slab_bytes
):
    """The forward pass to the last bit; the gradients are added in another order. The whole sequence, and in parts: the
    first half, then some blocks of the rest.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(lists, "MAX_SLAB_BYTES", slab_bytes)
    shape = {"device": DEVICE, "dtype": torch.bfloat16}
    q = torch.randn(batch, tokens, query_heads, head_dim, device=DEVICE).cumsum(1)
    q = (q / q.std()).bfloat16()
    k, v = (torch.randn(batch, tokens, kv_heads, head_dim, **shape) for _ in range(2))
    c = torch.randn(kv_heads, head_dim, **shape)
    spec = AttentionSpec(CHUNK, 1.5, routing_scale, prior_sigma, 1 / math.sqrt(head_dim))
    grid, n = ChunkGrid.whole_sequence(tokens, CHUNK), tokens // CHUNK
    summaries = triton_backend.summarize(k, grid, c, spec)
    queries = Queries(q, grid, summaries, triton_backend.route(q, grid, summaries, spec))
    for kernel in ("attend", "query_gradient"):
        assert pair_options(kernel, q, TileShape.of(q, kv_heads, spec), grid) is not None
    assert (gather_options(q, TileShape.of(q, kv_heads, spec), grid) is not None) == (head_dim == 128)
    whole, half = Part(k, v, grid), n // 2
    first = Part(*(x[:, : half * CHUNK].contiguous() for x in (k, v)), grid.take(range(half))) if half else None
    rest = blocks_of(k, v, range(half, n)) if half else None

    def outputs() -> list[torch.Tensor]:
        results = [*triton_backend.attend(queries, whole, spec, before=None, last=True)]
        if first is not None and rest is not None:
            before = triton_backend.attend(queries, first, spec, before=None, last=False)
            results += [*before, *triton_backend.attend(queries, rest, spec, before=before, last=True)]
        return results

    def gradients(out: torch.Tensor, lse: torch.Tensor) -> list[torch.Tensor]:
        grad = torch.randn_like(q)
        upstream = OutputGradient(grad, lse, triton_backend.row_dots(grad, out))
        results = [*triton_backend.finish_query_gradient(queries, upstream, whole, spec, None)]
        ratio = results[1]
        for part in (whole, first, rest):
            if part is not None:
                results += triton_backend.key_gradient(queries, upstream, ratio, part, c, spec)
        if first is not None and rest is not None:
            sums = triton_backend.query_gradient(queries, upstream, first, spec, None)
            results += [sums.dq.clone(), sums.weighted_sum.clone(), sums.slope_sum.clone()]
            results += triton_backend.finish_query_gradient(queries, upstream, rest, spec, sums)
        return results

    specialised = outputs()
    state = torch.cuda.get_rng_state()
    in_this_run = gradients(*specialised[:2])
    torch.cuda.set_rng_state(state)
    assert all(map(torch.equal, in_this_run, gradients(*specialised[:2])))  # the same bits in every run
    for stage, options in (
        ("attend", "pair_options"),
        ("query_gradient", "pair_options"),
        ("key_gradient", "gather_options"),
    ):
        module = importlib.import_module(f"dash_kernels.triton.{stage}")
        monkeypatch.setattr(module, options, lambda *_: None)
    assert all(map(torch.equal, specialised, outputs()))
    torch.cuda.set_rng_state(state)
    for ours, expected in zip(in_this_run, gradients(*specialised[:2]), strict=True):
        difference = (ours.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
        assert difference < 1e-4
