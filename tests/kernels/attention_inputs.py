"""Fresh random inputs, and a call's output with all its gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dash_kernels import eager
from dash_kernels.chunks import ChunkGrid
from dash_kernels.first_chunk import after_first_chunks
from dash_kernels.reference import entmax
from dash_kernels.spec import AttentionSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "q", "k", "v", "summary_query")


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    summary_query: torch.Tensor
    grad: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) for x in vars(self).values()))


def random_inputs(
    seq_len: int,
    *,
    kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 32,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int | None = None,
) -> Inputs:
    """Normal q, k, v, summary_query and output gradient; without a seed another draw at every call. The seed is in a
    failure's output.
    """
    seed = torch.seed() if seed is None else torch.manual_seed(seed).initial_seed()
    print(f"inputs drawn with seed {seed}")
    heads = (group * kv_heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(batch, seq_len, count, head_dim, device=DEVICE, dtype=torch.float64) for count in heads)
    summary_query = torch.randn(kv_heads, head_dim, device=DEVICE, dtype=torch.float64)
    return Inputs(q, k, v, summary_query, torch.randn_like(q)).to(dtype)


def output_and_gradients(function: Callable[..., Any], inputs: Inputs, **settings: Any) -> dict[str, torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.summary_query)]
    result = function(*leaves, **settings)
    out = result[0] if isinstance(result, tuple) else result
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)), strict=True))


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: ((actual[name].double() - expected[name]).norm() / expected[name].norm()).item() for name in expected}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    errors = relative_errors(actual, expected)
    assert max(errors.values()) <= tolerance, errors  # NaN fails as well


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """As `assert_close`, for results that may be zero: without an earlier chunk, summary_query has no gradient."""
    errors = {
        name: ((actual[name].double() - wanted).norm() / wanted.norm().clamp(min=1)).item()
        for name, wanted in expected.items()
    }
    assert max(errors.values()) <= tolerance, errors  # NaN fails as well


def routing_gaps(inputs: Inputs, query_chunks: ChunkGrid, key_chunks: ChunkGrid, spec: AttentionSpec) -> torch.Tensor:
    """x - tau of every query head and chunk in float64, by the reference's entmax [B, T, Hkv, G, n]: positive where a
    head gives the chunk a probability, -inf where the chunk is not an earlier one of the query's document.

    k is the whole sequence; alpha must be 1.5.
    """
    wide = inputs.to(torch.float64)
    summaries = eager.summarize(wide.k, key_chunks, wide.summary_query, spec)
    q = wide.q.unflatten(2, (wide.k.shape[2], -1))
    z = torch.einsum("bthgd,bnhd->bthgn", q, summaries) * spec.routing_logit_scale
    ids, _, lengths, firsts = query_chunks.on(q.device).long()
    chunk, first = (x.repeat_interleave(lengths).unsqueeze(-1) for x in (ids, firsts))  # [T, 1]
    candidates = torch.arange(len(key_chunks), device=q.device)
    allowed = ((candidates >= first) & (candidates < chunk))[None, :, None, None].expand_as(z)
    p = entmax(z, allowed, 1.5)
    x = torch.where(allowed, z / 2, -torch.inf)
    tau = x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).sqrt()
    return torch.where(allowed, x - tau, -torch.inf)


def clear_inputs(
    seq_len: int, call: dict[str, Any], margin: float = 1e-4, cu_seqlens: torch.Tensor | None = None, **shape: Any
) -> Inputs:
    """Random inputs, drawn again until no score is so close to its threshold that float32 cannot tell what is selected:
    there the mean of log P jumps.
    """
    for _ in range(100):
        inputs = random_inputs(seq_len, **shape)
        if selection_margin(inputs, call, cu_seqlens) > margin:
            return inputs
    raise AssertionError(f"no inputs with a margin of {margin} in 100 draws")


def selection_margin(inputs: Inputs, call: dict[str, Any], cu_seqlens: torch.Tensor | None = None) -> float:
    """Least distance of a score from its threshold; call: the settings of `dash_attention`."""
    bounds = [0, inputs.q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    grid = ChunkGrid.packed(bounds, call["chunk_size"])
    spec = spec_of(inputs, call)
    query_chunks = after_first_chunks(grid) if spec.attend_first_chunk else grid
    return routing_gaps(inputs, query_chunks, grid, spec).abs().amin().item()


def spec_of(inputs: Inputs, call: dict[str, Any]) -> AttentionSpec:
    scale = inputs.q.shape[-1] ** -0.5
    first = call.get("attend_first_chunk", False)
    return AttentionSpec(call["chunk_size"], 1.5, call.get("routing_scale", 1.0), call.get("prior_sigma"), scale, first)
