"""The reference against the definition: gradcheck, entmax's properties, hand-computed cases."""

import math

import pytest
import torch

from dash_kernels import reference_dash_attention
from dash_kernels.reference import entmax
from tests.kernels.attention_inputs import DEVICE, random_inputs

ALPHAS = (1.5, 2.0, 1.25)


def tiny_inputs() -> tuple[torch.Tensor, ...]:
    inputs = random_inputs(19, kv_heads=2, group=2, head_dim=3)
    return tuple(x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.summary_query))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck_with_the_prior_as_it_is(alpha: float) -> None:
    settings = {"chunk_size": 4, "alpha": alpha, "routing_scale": 2.0}
    assert torch.autograd.gradcheck(lambda *x: reference_dash_attention(*x, **settings)[0], tiny_inputs())


@pytest.mark.parametrize("prior_sigma", [0.7, 3.0])
def test_stop_gradient_of_the_mean_against_a_hand_written_derivative(prior_sigma: float) -> None:
    """With the means frozen at the point of evaluation, the function has the derivative the definition asks for."""
    q, k, v, c = tiny_inputs()
    chunk, scale = 4, 1 / math.sqrt(3)
    tokens, n = torch.arange(19, device=DEVICE), 4

    def log_prior(q: torch.Tensor, k: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = k[:, : n * chunk].reshape(1, n, chunk, 2, 3)
        weights = ((chunks * c).sum(-1) * scale).softmax(2)
        z = torch.einsum("bthgd,bnhd->bthgn", q.unflatten(2, (2, 2)), (weights[..., None] * chunks).sum(2)) * scale
        earlier = (torch.arange(n, device=DEVICE) < (tokens // chunk)[:, None])[None, :, None, None]
        prior = entmax(z, earlier.expand_as(z), 1.5).mean(3)
        return prior > 0, torch.where(prior > 0, prior, 1.0).log()

    with torch.no_grad():
        routed, values = log_prior(q, k, c)
        mean = values.sum(-1, keepdim=True) / routed.sum(-1, keepdim=True).clamp(min=1)

    def with_frozen_mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        routed, values = log_prior(q, k, c)
        bias = torch.where(routed, (values - mean) / prior_sigma, -math.inf)  # [1, T, Hkv, n]
        bias = torch.cat((bias, torch.full_like(bias[..., :1], -math.inf)), -1)  # the incomplete chunk
        bias = torch.where(torch.arange(n + 1, device=DEVICE) == (tokens // chunk)[None, :, None, None], 0.0, bias)
        scores = torch.einsum("bthgd,bshd->bhgts", q.unflatten(2, (2, 2)), k) * scale
        scores = scores + bias[..., tokens // chunk].transpose(1, 2).unsqueeze(2)
        scores = scores.masked_fill(tokens[:, None] < tokens, -math.inf)
        return torch.einsum("bhgts,bshd->bthgd", scores.softmax(-1), v).flatten(2, 3)

    inputs = (q, k, v, c)
    assert torch.autograd.gradcheck(with_frozen_mean, inputs)
    out = reference_dash_attention(*inputs, chunk_size=chunk, prior_sigma=prior_sigma)[0]
    expected = with_frozen_mean(*inputs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_sums_to_one_and_satisfies_its_optimality_condition(alpha: float) -> None:
    z = torch.randn(50, 33, dtype=torch.float64, device=DEVICE) * torch.logspace(-2, 1.5, 50).to(DEVICE)[:, None]
    allowed = torch.rand(z.shape, device=DEVICE) < 0.8
    allowed[:3] = False
    p = entmax(z, allowed, alpha)
    assert (p[~allowed] == 0).all()
    torch.testing.assert_close(p.sum(-1), allowed.any(-1).double())
    # On the support, (alpha - 1) z - p^(alpha - 1) is one number; outside, z is no larger than it.
    for row, scores, mask in zip(p[3:], (alpha - 1) * z[3:], allowed[3:], strict=True):
        tau = (scores - row ** (alpha - 1))[row > 0]
        assert tau.max() - tau.min() < 1e-9
        assert (scores[(row == 0) & mask] <= tau.max() + 1e-9).all()


def test_one_selected_chunk_is_attention_over_it_and_the_own_chunk() -> None:
    """A very large routing_scale leaves one chunk with P = 1: plain softmax over its tokens and the own ones."""
    inputs = random_inputs(48, kv_heads=1, group=1, head_dim=8)
    out, routing = reference_dash_attention(
        inputs.q, inputs.k, inputs.v, inputs.summary_query * 0, chunk_size=16, routing_scale=1e6
    )
    q, k, v = inputs.q[0, 40, 0], inputs.k[0, :, 0], inputs.v[0, :, 0]
    best = int((k[:32].view(2, 16, 8).mean(1) @ q).argmax())
    visible = torch.cat((torch.arange(16) + 16 * best, torch.arange(32, 41))).to(DEVICE)
    expected = torch.softmax(k[visible] @ q / math.sqrt(8), 0) @ v[visible]
    torch.testing.assert_close(out[0, 40, 0], expected)
    assert routing.selected_per_token[0, 40, 0] == 2


def test_statistics_count_the_own_chunk_on_both_sides() -> None:
    inputs = random_inputs(40, head_dim=8)
    _, routing = reference_dash_attention(inputs.q, inputs.k, inputs.v, inputs.summary_query, chunk_size=16)
    assert routing.available_per_token.tolist() == [1] * 16 + [2] * 16 + [3] * 8
    assert (routing.selected_per_token[:, :32].cpu() == routing.available_per_token[:32, None].cpu()).all()
    expected = routing.selected_per_token.sum() / (routing.available_per_token.sum() * 2)
    assert routing.density.item() == pytest.approx(expected.item())
