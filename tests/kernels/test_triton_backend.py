"""The Triton kernels against the float64 reference: through the interpreter without a GPU, compiled with one."""

import pytest
import torch
from attention_inputs import (
    DEVICE,
    Inputs,
    assert_close,
    output_and_gradients,
    random_inputs,
    relative_errors,
)

from dash_kernels import dash_attention, reference_dash_attention

# (group, head_dim, chunk_size, prior_sigma, tokens): every group, head dim and prior mode with several chunk sizes,
# tokens never a multiple of the chunk
SHAPES = [
    (1, 32, 16, None, 75),
    (4, 32, 32, 1.0, 90),
    (8, 32, 64, None, 150),
    (1, 64, 48, 2.0, 130),
    (4, 64, 128, None, 270),
    (8, 64, 16, 1.0, 45),
    (1, 128, 64, 1.0, 140),
    (4, 128, 16, None, 60),
    (8, 128, 32, None, 70),
    (3, 96, 16, None, 40),
]


@pytest.mark.parametrize(("group", "head_dim", "chunk_size", "prior_sigma", "seq_len"), SHAPES)
def test_float32_equals_the_float64_reference(
    group: int, head_dim: int, chunk_size: int, prior_sigma: float | None, seq_len: int
) -> None:
    kv_heads = 2 if group == 1 else 1
    inputs = random_inputs(seq_len, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=torch.float32)
    call = {"chunk_size": chunk_size, "prior_sigma": prior_sigma, "routing_scale": 2.0}
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    assert_close(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected, 2e-5)


def test_transposed_inputs_and_padded_heads_with_a_steep_prior() -> None:
    """Batches of 2 as Megatron-core holds them, [T, B, H, D]; three heads per KV head leave a row of a tile unused."""
    inputs = random_inputs(40, batch=2, kv_heads=1, group=3, dtype=torch.float32)
    call = {"chunk_size": 16, "prior_sigma": 0.05, "routing_scale": 2.0}
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 4 else x for x in vars(inputs).values()]
    assert not turned[0].is_contiguous()
    assert_close(output_and_gradients(dash_attention, Inputs(*turned), backend="triton", **call), expected, 2e-4)


@pytest.mark.parametrize("seq_len", [1, 16, 17])
def test_lengths_around_the_first_chunk(seq_len: int) -> None:
    """Without an earlier chunk nothing is routed, and the gradient of summary_query is zero."""
    inputs = random_inputs(seq_len, kv_heads=1, dtype=torch.float32)
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), chunk_size=16)
    actual = output_and_gradients(dash_attention, inputs, chunk_size=16, backend="triton")
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name].double(), wanted, atol=1e-5, rtol=1e-5)


def test_float16_and_statistics() -> None:
    inputs = random_inputs(70, batch=2, kv_heads=1, dtype=torch.float16)
    call = {"chunk_size": 16, "routing_scale": 30.0}
    wide = inputs.to(torch.float64)
    expected = output_and_gradients(reference_dash_attention, wide, **call)
    assert_close(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected, 2e-3)
    routing = dash_attention(
        inputs.q, inputs.k, inputs.v, inputs.summary_query, backend="triton", return_routing=True, **call
    )[1]
    wanted = reference_dash_attention(wide.q, wide.k, wide.v, wide.summary_query, **call)[1]
    assert (routing.selected_per_token == wanted.selected_per_token).all()
    assert wanted.density < 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: bfloat16 is wrong in Triton's interpreter")
@pytest.mark.parametrize("prior_sigma", [None, 1.0])
@pytest.mark.parametrize(
    ("seq_len", "kv_heads", "group", "head_dim", "chunk_size"),
    [(1000, 2, 4, 128, 64), (4096 + 17, 2, 8, 64, 32), (3000, 2, 1, 256, 128), (16384, 1, 2, 128, 64)],
)
def test_bfloat16_is_as_exact_as_an_eager_implementation(
    seq_len: int, kv_heads: int, group: int, head_dim: int, chunk_size: int, prior_sigma: float | None
) -> None:
    inputs = random_inputs(seq_len, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=torch.bfloat16)
    call = {"chunk_size": chunk_size, "prior_sigma": prior_sigma, "routing_scale": 4.0}
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    torch.cuda.empty_cache()
    ours = relative_errors(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected)
    eager = relative_errors(output_and_gradients(reference_dash_attention, inputs, **call), expected)
    print(f"relative errors, Triton {ours}, eager bfloat16 {eager}")
    for name, error in ours.items():
        assert error <= 2 * eager[name], (name, ours, eager)
