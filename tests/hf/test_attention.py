"""One layer: decoding and chunked prefill against the attention of the whole sequence."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from dash_dist.hf.attention import attention_forward, padding_bounds
from dash_dist.hf.cache import DashCacheLayer
from dash_kernels import dash_attention

CHUNK, HEAD_DIM = 16, 16


class Layer(nn.Module):
    """An attention module as transformers has it, without projections."""

    def __init__(self, kv_heads: int, **settings: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(dash_attention={"chunk_size": CHUNK, **settings})
        self.summary_query = nn.Parameter(torch.randn(kv_heads, HEAD_DIM), requires_grad=False)


def inputs(rows: int, length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(heads * 10 + kv_heads)
    return [torch.randn(rows, count, length, HEAD_DIM, dtype=dtype) for count in (heads, kv_heads, kv_heads)]


def in_pieces(
    layer: Layer, qkv: list[torch.Tensor], sizes: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Outputs [B, T, Hq, D] of calls with so many new tokens each."""
    cache = DashCacheLayer()
    outputs = []
    for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        q, k, v = (x[:, :, start:end] for x in qkv)
        keys, values = cache.update(k, v)
        bounds = padding_bounds(kv_length=end, attention_mask=None if mask is None else mask[:, :end])
        outputs.append(attention_forward(layer, q, keys, values, bounds, dash_cache=cache)[0])
    return torch.cat(outputs, dim=1)


def whole(layer: Layer, qkv: list[torch.Tensor]) -> torch.Tensor:
    return dash_attention(*(x.transpose(1, 2) for x in qkv), layer.summary_query, **layer.config.dash_attention)


@pytest.mark.parametrize("prior_sigma", [None, 2.0, 1e6])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("routing_scale", [1.0, 10.0])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_decoding_equals_prefill_at_every_position(alpha, routing_scale, group, prior_sigma):
    layer = Layer(2, alpha=alpha, routing_scale=routing_scale, prior_sigma=prior_sigma)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        qkv = inputs(2, 67, 2 * group, 2, dtype)
        expected = whole(layer, qkv)
        torch.testing.assert_close(in_pieces(layer, qkv, [1] * 67), expected, rtol=tolerance, atol=tolerance)
        mixed = in_pieces(layer, qkv, [20, 1, 11, 1, 1, 33])
        torch.testing.assert_close(mixed, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [[1] * 67, [20, 1, 11, 1, 1, 33]])
def test_the_first_chunk_is_attended_with_cached_tokens_and_padding(sizes):
    layer = Layer(2, routing_scale=10.0, prior_sigma=2.0, attend_first_chunk=True)
    qkv = inputs(3, 67, 4, 2, torch.float64)
    starts = [0, 5, 50]
    found = in_pieces(layer, qkv, sizes, torch.arange(67) >= torch.tensor(starts)[:, None])
    for row, start in enumerate(starts):
        alone = whole(layer, [x[row : row + 1, :, start:] for x in qkv])
        torch.testing.assert_close(found[row, start:], alone[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(in_pieces(layer, qkv, sizes), whole(layer, qkv), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [[67], [32, 35], [5, 20, 40, 2], [16, 16, 16, 16, 3]])
def test_chunked_prefill_equals_one_call(sizes):
    layer = Layer(2, routing_scale=10.0)
    qkv = inputs(2, 67, 4, 2, torch.float32)
    torch.testing.assert_close(in_pieces(layer, qkv, sizes), whole(layer, qkv), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [[67], [20, 20, 27], [1] * 67, [30] + [1] * 37, [3, 40] + [1] * 24])
def test_rows_with_padding_equal_rows_alone(sizes):
    layer = Layer(2, routing_scale=10.0)
    qkv = inputs(4, 67, 4, 2, torch.float32)
    starts = [0, 5, 33, 50]
    mask = torch.arange(67) >= torch.tensor(starts)[:, None]
    found = in_pieces(layer, qkv, sizes, mask)
    assert found.isfinite().all()
    for row, start in enumerate(starts):
        alone = whole(layer, [x[row : row + 1, :, start:] for x in qkv])
        tolerance = 1e-5 if 1 in sizes else 1e-6
        torch.testing.assert_close(found[row, start:], alone[0], rtol=tolerance, atol=tolerance)


def test_padding_on_the_right_is_removed():
    layer = Layer(2, routing_scale=10.0)
    qkv = inputs(3, 67, 4, 2, torch.float32)
    lengths = [67, 40, 9]
    found = in_pieces(layer, qkv, [67], torch.arange(67) < torch.tensor(lengths)[:, None])
    for row, length in enumerate(lengths):
        alone = whole(layer, [x[row : row + 1, :, :length] for x in qkv])
        torch.testing.assert_close(found[row, :length], alone[0], rtol=0, atol=0)


def test_rows_are_reordered_repeated_and_selected_with_their_summaries():
    layer = Layer(2, routing_scale=10.0)
    q, k, v = inputs(3, 67, 4, 2, torch.float32)
    mask = torch.arange(67) >= torch.tensor([0, 20, 3])[:, None]
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
    }
    for change, (argument, rows) in changes.items():
        cache = DashCacheLayer()
        cache.update(k[:, :, :50], v[:, :, :50])
        bounds = padding_bounds(kv_length=50, attention_mask=mask[:, :50])
        attention_forward(layer, q[:, :, :50], cache.keys, cache.values, bounds, dash_cache=cache)
        getattr(cache, change)(argument)
        found = []
        for position in range(50, 67):
            new = slice(position, position + 1)
            keys, values = cache.update(k[rows, :, new], v[rows, :, new])
            bounds = padding_bounds(kv_length=position + 1, attention_mask=mask[rows, : position + 1])
            found.append(attention_forward(layer, q[rows, :, new], keys, values, bounds, dash_cache=cache)[0])
        expected = in_pieces(layer, [q, k, v], [67], mask)[rows, 50:]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [50, 48, 47, 5])
def test_a_cropped_cache_forgets_the_last_chunks(kept):
    layer = Layer(2, routing_scale=10.0)
    q, k, v = inputs(2, 67, 4, 2, torch.float32)
    removed = [torch.cat((x[:, :, :kept], torch.randn_like(x[:, :, kept:])), dim=2) for x in (k, v)]
    cache = DashCacheLayer()
    for new in (slice(0, 40), slice(40, 60)):
        cache.update(*(x[:, :, new] for x in removed))
        attention_forward(layer, q[:, :, new], cache.keys, cache.values, None, dash_cache=cache)
    cache.crop(kept - 60)
    assert cache.get_seq_length() == kept
    found = []
    for position in range(kept, 67):
        new = slice(position, position + 1)
        keys, values = cache.update(k[:, :, new], v[:, :, new])
        found.append(attention_forward(layer, q[:, :, new], keys, values, None, dash_cache=cache)[0])
    torch.testing.assert_close(torch.cat(found, dim=1), whole(layer, [q, k, v])[:, kept:], rtol=1e-5, atol=1e-5)


def test_a_step_copies_no_earlier_token_and_a_reset_cache_starts_again():
    layer = Layer(2)
    qkv = inputs(1, 67, 4, 2, torch.float32)
    cache = DashCacheLayer()
    places = set()
    for _ in range(2):
        for position in range(67):
            q, k, v = (x[:, :, position : position + 1] for x in qkv)
            keys, values = cache.update(k, v)
            attention_forward(layer, q, keys, values, None, dash_cache=cache)
            places.add(keys.data_ptr())
        assert cache.summaries.shape[1] == 67 // CHUNK
        assert len(places) <= 4
        cache.reset()
        places.clear()
        assert cache.get_seq_length() == 0


def test_inference_mode_may_come_and_go():
    layer = Layer(2)
    q, k, v = inputs(1, 40, 4, 2, torch.float32)
    cache, found = DashCacheLayer(), []
    for position in range(40):
        new = slice(position, position + 1)
        with torch.inference_mode(position % 3 == 1):
            keys, values = cache.update(k[:, :, new], v[:, :, new])
            found.append(attention_forward(layer, q[:, :, new], keys, values, None, dash_cache=cache)[0])
    torch.testing.assert_close(torch.cat(found, 1), whole(layer, [q, k, v]), rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_prefill_and_are_refused_through_cached_tokens():
    layer = Layer(2)
    q, k, v = (x.requires_grad_() for x in inputs(1, 40, 4, 2, torch.float32))
    cache = DashCacheLayer()
    keys, values = cache.update(k[:, :, :30], v[:, :, :30])
    attention_forward(layer, q[:, :, :30], keys, values, None, dash_cache=cache)[0].sum().backward()
    assert q.grad.abs().sum() > 0
    for new in (slice(30, 35), slice(35, 36)):
        keys, values = cache.update(k[:, :, new], v[:, :, new])
        out, _ = attention_forward(layer, q[:, :, new], keys, values, None, dash_cache=cache)
        with pytest.raises(RuntimeError, match="no gradient through cached tokens"):
            out.sum().backward()


def test_masks_that_cannot_be_computed_are_refused():
    holes = torch.tensor([[1, 1, 1], [1, 0, 1]])
    with pytest.raises(ValueError, match="row 1 of attention_mask has padding between tokens"):
        padding_bounds(kv_length=3, attention_mask=holes)
    with pytest.raises(ValueError, match="2 columns for 3 tokens"):
        padding_bounds(kv_length=3, attention_mask=holes[:, :2])
    with pytest.raises(ValueError, match="another mask than a causal one"):
        padding_bounds(kv_length=3, mask_function=lambda *_: True)
    layer, qkv = Layer(2), inputs(2, 20, 4, 2, torch.float32)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 1, 20, 20\)"):
        attention_forward(layer, *qkv, torch.ones(2, 1, 20, 20))
    with pytest.raises(ValueError, match=r"no attention dropout \(0.1\)"):
        attention_forward(layer, *qkv, None, dropout=0.1)
    with pytest.raises(ValueError, match="got sliding_window 8 for a layer of kind dash"):
        attention_forward(layer, *qkv, None, sliding_window=8)
    with pytest.raises(ValueError, match="19 cached tokens reached dash_attention without their summaries"):
        attention_forward(layer, qkv[0][:, :, :1], *qkv[1:], None)


def test_a_mask_that_moves_a_row_is_refused():
    layer, qkv = Layer(2), inputs(2, 20, 4, 2, torch.float32)
    mask = torch.arange(20) >= torch.tensor([[0], [4]])
    cache = DashCacheLayer()
    cache.update(*(x[:, :, :19] for x in qkv[1:]))
    bounds = padding_bounds(kv_length=19, attention_mask=mask[:, :19])
    attention_forward(layer, qkv[0][:, :, :19], cache.keys, cache.values, bounds, dash_cache=cache)
    cache.update(*(x[:, :, 19:] for x in qkv[1:]))
    with pytest.raises(ValueError, match="row 1 of the batch starts at token 0 now and started at 4 before"):
        attention_forward(layer, qkv[0][:, :, 19:], cache.keys, cache.values, None, dash_cache=cache)


def test_caches_of_other_attentions_are_refused():
    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="holds 3 tokens that another attention stored"):
        DashCacheLayer.of(cache, 0)
