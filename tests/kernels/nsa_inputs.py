"""Fresh random inputs of Native Sparse Attention, and a call's output with all its gradients."""

from dataclasses import dataclass
from typing import Any

import torch

from dash_kernels.compression import CompressionWeights
from dash_kernels.nsa import Branches, nsa_attention
from dash_kernels.reference_nsa import reference_nsa_attention
from dash_kernels.spec import AttentionSpec
from tests.kernels.attention_inputs import DEVICE

NAMES = (
    *("q", "k", "v", "summary_query", "compressed_k", "compressed_v", "window_k", "window_v", "gates"),
    *(f"{of} {weight}" for of in ("keys'", "values'") for weight in ("positions", "inner", "outer")),
)
Found = dict[str, torch.Tensor]


@dataclass(frozen=True)
class NSAInputs:
    """Tensors by `NAMES`, angles of a rotary embedding, and the output's gradient."""

    tensors: tuple[torch.Tensor, ...]
    angles: tuple[torch.Tensor, torch.Tensor] | None
    grad: torch.Tensor

    def to(self, dtype: torch.dtype) -> "NSAInputs":
        return NSAInputs(tuple(x.to(dtype) for x in self.tensors), self.angles, self.grad.to(dtype))


def random_nsa_inputs(
    tokens: int,
    *,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    batch: int = 1,
    width: int = 5,
    rotated: bool = True,
    generator: torch.Generator | None = None,
) -> NSAInputs:
    """Normal inputs, gates from 0 to 1, and weights that keep the spread of the keys; another draw at every call."""
    if generator is None:
        generator = torch.Generator().manual_seed(seed := torch.seed())
        print(f"inputs drawn with seed {seed}")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    of_keys = batch, tokens, kv_heads, head_dim
    q = normal(batch, tokens, kv_heads * group, head_dim)
    keys_and_values = [normal(*of_keys) for _ in range(6)]
    gates = torch.rand(*q.shape[:3], 3, generator=generator, dtype=torch.float64).to(DEVICE)
    weights = [
        weight
        for _ in range(2)
        for weight in (
            normal(kv_heads, 32, head_dim),
            normal(kv_heads, 32 * head_dim, width) / (32 * head_dim) ** 0.5,
            normal(kv_heads, width, head_dim) * 2,
        )
    ]
    turns = normal(tokens, head_dim // 2).float()
    return NSAInputs(
        (q, *keys_and_values[:2], normal(kv_heads, head_dim), *keys_and_values[2:], gates, *weights),
        (turns.cos(), turns.sin()) if rotated else None,
        normal(*q.shape),
    )


def arguments_of(tensors: tuple[torch.Tensor, ...], angles: Any) -> tuple[Any, ...]:
    """Positional arguments of `nsa_attention`."""
    branches = Branches(*tensors[4:9], angles)
    return *tensors[:4], branches, CompressionWeights(*tensors[9:12]), CompressionWeights(*tensors[12:])


def found_of(inputs: NSAInputs, spec: AttentionSpec, window: int, **arguments: Any) -> Found:
    """Output, selected chunks and gradients of the call."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs.tensors)
    out, routing = nsa_attention(
        *arguments_of(leaves, inputs.angles), spec=spec, window=window, return_routing=True, **arguments
    )
    gradients = torch.autograd.grad(out, leaves, inputs.grad)
    return {"output": out.detach(), "selected": routing.selected_per_token, **dict(zip(NAMES, gradients, strict=True))}


def expected_of(inputs: NSAInputs, spec: AttentionSpec, window: int, cu_seqlens: torch.Tensor | None = None) -> Found:
    """The same by the float64 reference; the gradient of `summary_query` is zeros."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in inputs.tensors]
    q, k, v, summary_query, *others = leaves
    out, selected = reference_nsa_attention(
        *(q, k, v, *others[:5]),
        (others[5], others[6], others[7]),
        (others[8], others[9], others[10]),
        selection=spec.selection,
        window=window,
        chunk_size=spec.chunk_size,
        angles=None if inputs.angles is None else (inputs.angles[0].cpu(), inputs.angles[1].cpu()),
        cu_seqlens=cu_seqlens,
    )
    out = out + 0 * summary_query.sum() + 0 * sum(x.sum() for x in others)  # gradients of zeros without a block
    gradients = torch.autograd.grad(out, leaves, inputs.grad.double().cpu())
    found = {"output": out.detach(), "selected": selected, **dict(zip(NAMES, gradients, strict=True))}
    return {name: x.to(DEVICE) for name, x in found.items()}


def assert_found(found: Found, expected: Found, tolerance: float) -> None:
    """Selected chunks are equal, and everything else near in the norm."""
    assert torch.equal(found["selected"], expected["selected"])
    errors = {
        name: ((found[name].double() - wanted).norm() / wanted.norm().clamp(min=1)).item()
        for name, wanted in expected.items()
        if name != "selected"
    }
    assert max(errors.values()) <= tolerance, errors  # NaN fails as well
