"""The eager backend against the reference in float64, and the thresholds found without sorting."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_kernels import dash_attention, reference_dash_attention
from dash_kernels.entmax import entmax_threshold
from dash_kernels.reference import entmax
from tests.kernels.attention_inputs import DEVICE, assert_close, output_and_gradients, random_inputs


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_equals_the_reference_in_output_and_gradients(group: int, head_dim: int) -> None:
    for chunk_size, prior_sigma, alpha in itertools.product((16, 48, 128), (None, 1.5), (1.5, 2.0, 1.3)):
        inputs = random_inputs(2 * chunk_size + 29, group=group, head_dim=head_dim, batch=2)
        call = {"chunk_size": chunk_size, "alpha": alpha, "prior_sigma": prior_sigma, "routing_scale": 2.0}
        expected = output_and_gradients(reference_dash_attention, inputs, **call)
        assert_close(output_and_gradients(dash_attention, inputs, backend="eager", **call), expected, 1e-10)


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 160])
def test_lengths_around_a_chunk(seq_len: int) -> None:
    inputs = random_inputs(seq_len)
    expected = output_and_gradients(reference_dash_attention, inputs, chunk_size=16)
    assert_close_or_zero(output_and_gradients(dash_attention, inputs, chunk_size=16, backend="eager"), expected)


def test_statistics_softmax_scale_and_non_contiguous_inputs() -> None:
    inputs = random_inputs(100)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    assert not q.is_contiguous()
    call = {"chunk_size": 16, "softmax_scale": 0.4, "routing_scale": 3.0}
    expected, wanted = reference_dash_attention(q, k, v, inputs.summary_query, **call)
    out, routing = dash_attention(q, k, v, inputs.summary_query, backend="eager", return_routing=True, **call)
    torch.testing.assert_close(out, expected)
    assert (routing.selected_per_token == wanted.selected_per_token).all()
    assert routing.density == wanted.density < 1


def test_autocast_changes_nothing() -> None:
    inputs = random_inputs(100, dtype=torch.float32)
    expected = output_and_gradients(dash_attention, inputs, chunk_size=16, backend="eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = output_and_gradients(dash_attention, inputs, chunk_size=16, backend="eager")
    for name, wanted in expected.items():
        assert torch.equal(actual[name], wanted), name


def test_released_models_prior_leaves_only_the_selection() -> None:
    inputs = random_inputs(150)
    call = {"chunk_size": 16, "prior_sigma": 1e6, "routing_scale": 4.0}
    expected = output_and_gradients(reference_dash_attention, inputs, **call)
    assert_close(output_and_gradients(dash_attention, inputs, backend="eager", **call), expected, 1e-7)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 3000),
    log_scale=st.floats(-3, 2),
    alpha=st.sampled_from((1.5, 2.0, 1.2, 1.75)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_threshold_without_sorting_is_the_sorted_one(
    seed: int, n: int, log_scale: float, alpha: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(20, n, generator=generator, dtype=torch.float64) * 10**log_scale).to(DEVICE)
    x = ((alpha - 1) * z).to(dtype)
    expected = entmax(x.double() / (alpha - 1), torch.ones_like(z, dtype=torch.bool), alpha)
    p = (x - entmax_threshold(x, alpha).unsqueeze(-1)).clamp(min=0).pow(1 / (alpha - 1))
    # x itself is known to eps |x| in its dtype
    tolerance = 100 * torch.finfo(dtype).eps * (1 + x.abs().max().item())
    assert (p - expected).abs().max() <= tolerance


def assert_close_or_zero(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Without an earlier chunk nothing is routed, and the gradient of summary_query is zero."""
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, atol=1e-12, rtol=1e-9)
