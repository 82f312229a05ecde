"""Dense attention: by torch on one device, and by the stages of DashAttention with a routing scale of 0."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dash_dist.context_parallel import DashAttention
from tests.context_parallel.dense_jobs import CHUNK, inputs
from tests.support.ranks import run_ranks


def expected(documents: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Output and gradients of torch's attention, each document by itself, in float64."""
    q, k, v, grad = inputs()
    outputs = []
    for start, end in documents:
        parts = (tensor[:, start:end].transpose(1, 2) for tensor in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2))
    out = torch.cat(outputs, dim=1)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    return dict(zip(("out", "q", "k", "v"), (out.detach(), *gradients), strict=True))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)
    assert not found["summary_query"].any()


@pytest.mark.parametrize("borders", [None, (0, 64, 80, 192)])
def test_one_device(borders: tuple[int, ...] | None) -> None:
    q, k, v, grad = inputs()
    attention = DashAttention(2, q.shape[-1], chunk_size=CHUNK, dense=True, dtype=torch.float64)
    attention.record_routing = True
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    out = attention(q, k, v, cu_seqlens)
    gradients = torch.autograd.grad(out, (q, k, v, attention.summary_query), grad)
    found = dict(zip(("out", "q", "k", "v", "summary_query"), (out.detach(), *gradients), strict=True))
    edges = borders or (0, q.shape[1])
    assert_same(found, expected(list(itertools.pairwise(edges))))
    assert attention.routing is None  # there is none to record


@pytest.mark.parametrize("tokens", [192, 187])
def test_the_stages_are_dense_attention(tokens: int) -> None:
    """The same limit without torch's kernels: the call that ranks make, on one device."""
    q, k, v, _ = (tensor[:, :tokens] for tensor in inputs())
    module = DashAttention(2, q.shape[-1], chunk_size=CHUNK, dense=True, dtype=torch.float64)
    out = module(q, k, v, torch.tensor([0, tokens], dtype=torch.int32))
    wanted = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["selective", "allgather", "ring", "auto"])
def test_over_ranks(exchange: str) -> None:
    wanted = expected([(0, 192)])
    for rank in run_ranks("tests.context_parallel.dense_jobs:attend", 2, exchange, cpu_only=True):
        assert_same(rank, wanted)
