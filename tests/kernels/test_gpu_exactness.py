"""How exact the Triton backend is in bfloat16, against PyTorch's own flash attention, on shapes drawn afresh."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_kernels import dash_attention, reference_dash_attention
from tests.kernels.attention_inputs import (
    DEVICE,
    Inputs,
    assert_close,
    output_and_gradients,
    random_inputs,
    relative_errors,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: bfloat16 is wrong in Triton's interpreter"),
]

GROUPS, HEAD_DIMS, PRIOR_SIGMAS = (1, 2, 4, 8, 16), (64, 96, 128, 256), (None, 1.0)
LONGEST = 8192
# Query heads times T^2: the float64 reference keeps a dozen tensors of that many numbers.
SCORES = 4e8


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Causal dense attention of [B, T, H, D] in the inputs' dtype, the T x T scores written out."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -torch.inf).softmax(-1), values)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2)


def dense_gradients(function: Callable[..., torch.Tensor], inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and gradients of q, k and v: dense attention has no summary_query."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = function(*leaves, inputs.summary_query)
    gradients = torch.autograd.grad(out, leaves, inputs.grad)
    return dict(zip(("output", "q", "k", "v"), (out.detach(), *gradients), strict=True))


@pytest.mark.parametrize("case", range(8))
def test_errors_are_at_most_twice_those_of_flash_attention(case: int) -> None:
    """Every group and head dim occurs, the rest is drawn; summary_query is held to flash's largest error."""
    seed = random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    group, head_dim = GROUPS[case % len(GROUPS)], HEAD_DIMS[case % len(HEAD_DIMS)]
    kv_heads = draw.choice([1, 2]) if group < 8 else 1
    seq_len = draw.randint(512, min(LONGEST, int((SCORES / (group * kv_heads)) ** 0.5)))
    chunk_size = draw.choice(range(16, 129, 16))
    prior_sigma = draw.choice(PRIOR_SIGMAS)
    routing_scale = 2 ** draw.uniform(-1, 3)
    shape = {"seq_len": seq_len, "kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    call = {"chunk_size": chunk_size, "prior_sigma": prior_sigma, "routing_scale": routing_scale}
    print(f"drawn with seed {seed}: {shape}, {call}")

    inputs = random_inputs(**shape, dtype=torch.bfloat16)
    wide = inputs.to(torch.float64)
    dense = dense_gradients(dense_attention, wide)
    flash = relative_errors(dense_gradients(flash_attention, inputs), dense)
    del dense
    torch.cuda.empty_cache()
    expected = output_and_gradients(reference_dash_attention, wide, **call)
    torch.cuda.empty_cache()
    ours = relative_errors(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected)
    print(f"relative errors: Triton {ours}, flash attention {flash}")
    allowed = flash | {"summary_query": max(flash.values())}
    for name, error in ours.items():
        assert error <= 2 * allowed[name], (name, ours, flash)  # NaN fails as well


@pytest.mark.parametrize(("group", "head_dim", "prior_sigma"), [(16, 128, None), (4, 128, 1.0), (1, 64, None)])
def test_a_second_run_gives_the_same_bits(group: int, head_dim: int, prior_sigma: float | None) -> None:
    inputs = random_inputs(5000, group=group, head_dim=head_dim, dtype=torch.bfloat16)
    call = {"chunk_size": 64, "prior_sigma": prior_sigma, "routing_scale": 4.0, "backend": "triton"}
    first, second = (output_and_gradients(dash_attention, inputs, **call) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("seq_len", [4097, 4159])
def test_slices_of_a_fused_projection_equal_contiguous_inputs(seq_len: int) -> None:
    """q, k and v as a model holds them, side by side in one tensor; one token, and all but one, in the last chunk."""
    inputs = random_inputs(seq_len, group=8, head_dim=128, dtype=torch.bfloat16)
    call = {"chunk_size": 64, "routing_scale": 4.0, "backend": "triton"}
    heads = [x.shape[2] for x in (inputs.q, inputs.k, inputs.v)]
    sliced = torch.cat((inputs.q, inputs.k, inputs.v), dim=2).split(heads, dim=2)
    assert not any(x.is_contiguous() for x in sliced)
    expected = output_and_gradients(dash_attention, inputs, **call)
    actual = output_and_gradients(dash_attention, Inputs(*sliced, inputs.summary_query, inputs.grad), **call)
    assert_close(actual, {name: tensor.double() for name, tensor in expected.items()}, 2e-3)
