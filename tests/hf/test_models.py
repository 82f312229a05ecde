"""Whole models of transformers: loading, saving, generating, refusing."""

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dash_dist.hf
from dash_dist.errors import ConfigError
from dash_dist.hf import registration
from dash_dist.hf.cache import DashCacheLayer
from tests.hf.tiny import CHUNK, FAMILIES, SETTINGS, reference_forward, save, tiny_config, tiny_model, tokens

LENGTH = 5 * CHUNK + 7


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


pytestmark = pytest.mark.usefixtures("no_gradients")


def padded(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, attention_mask), both [rows, longest]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for row, row_tokens in enumerate(rows):
        place = slice(longest - len(row_tokens), None) if side == "left" else slice(len(row_tokens))
        ids[row, place], mask[row, place] = row_tokens, 1
    return ids, mask


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dash_attention")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_float64_reference(family, tmp_path, monkeypatch):
    folder = save(tiny_model(family), tmp_path)
    model, ids = loaded(folder), tokens(2, LENGTH)
    found, double = model(ids).logits, model.double()(ids).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "dash_attention", reference_forward)
    expected = model(ids, use_cache=False).logits
    model.config._attn_implementation = "eager"
    assert (model(ids).logits - expected).abs().max() > 1e-2  # dense attention is another function
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(double, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_and_chunked_prefill_equal_one_call(family):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    for size in (1, 23):
        cache = DynamicCache(config=model.config)
        found = [model(piece, past_key_values=cache).logits for piece in ids.split(size, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)
        assert [layer.summaries.shape[1] for layer in cache.layers] == [LENGTH // CHUNK] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(side):
    model = tiny_model()
    rows = [tokens(1, length, seed=length)[0] for length in (LENGTH, 40, 9)]
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, row_tokens in enumerate(rows):
        alone = model(row_tokens[None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prefill_chunk_size": 13},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
    ],
    ids=["greedy", "beams", "chunked prefill", "prompt lookup", "sampling"],
)
def test_generate_with_a_cache_equals_generate_without(options):
    model, ids = tiny_model(dtype=torch.float64), tokens(1, 30)
    mask = torch.ones_like(ids)
    of_caches = {"prefill_chunk_size", "prompt_lookup_num_tokens"}
    without = {key: value for key, value in options.items() if key not in of_caches}
    generated = []
    for chosen, use_cache in ((options, True), (without, False)):
        torch.manual_seed(0)
        generated.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=40, pad_token_id=0, use_cache=use_cache, **chosen)
        )
    assert generated[0].shape == (1, 70)
    assert generated[0].tolist() == generated[1].tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("chunks", [None, 11])
def test_generation_from_a_left_padded_batch_equals_its_rows(beams, chunks):
    model = tiny_model(dtype=torch.float64)
    rows = [tokens(1, length, seed=length)[0] for length in (50, 31, 3)]
    options = {"max_new_tokens": 40, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    ids, mask = padded(rows)
    found = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunks, **options)
    for row, row_tokens in enumerate(rows):
        alone = model.generate(row_tokens[None], attention_mask=torch.ones_like(row_tokens[None]), **options)
        assert found[row, 50:].tolist() == alone[0, len(row_tokens) :].tolist()


def test_parameters_and_settings_survive_saving(tmp_path):
    model, ids = tiny_model(), tokens(1, LENGTH)
    again = loaded(save(model, tmp_path))
    assert again.config.dash_attention == SETTINGS
    assert {name for name in load_file(tmp_path / "model.safetensors") if "summary_query" in name} == {
        f"model.layers.{layer}.self_attn.summary_query" for layer in range(2)
    }
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(dash_dist.hf.load(tmp_path)(ids).logits, model(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(again)(ids).logits, model(ids).logits, rtol=0, atol=0)
    half = dash_dist.hf.load(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.summary_query.dtype == torch.bfloat16
    more = half.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0)
    assert more.shape == (1, LENGTH + 3)


def test_another_routing_scale_is_another_function(tmp_path):
    folder, ids = save(tiny_model(), tmp_path), tokens(1, LENGTH)
    trained, other = dash_dist.hf.load(folder), dash_dist.hf.load(folder, routing_scale=1.0)
    assert other.config.dash_attention["routing_scale"] == 1.0
    assert (trained(ids).logits - other(ids).logits).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient():
    model, ids = tiny_model(), tokens(2, LENGTH)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_a_model_without_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="configuration has no 'dash_attention'"):
        AutoModelForCausalLM.from_config(tiny_config(settings=None), attn_implementation="dash_attention")
    dense = AutoModelForCausalLM.from_config(tiny_config(settings=None))
    assert not hasattr(dense.model.layers[0].self_attn, "summary_query")
    dense.save_pretrained(tmp_path)
    for load in (loaded, dash_dist.hf.load):
        with pytest.raises(ValueError, match="configuration has no 'dash_attention'"):
            load(tmp_path)
    dense.set_attn_implementation("dash_attention")
    with pytest.raises(ValueError, match="configuration has no 'dash_attention'"):
        dense(tokens(1, 5))


@pytest.mark.parametrize("kept", [0, 1])
def test_a_checkpoint_without_summary_queries_is_refused(tmp_path, kept):
    save(tiny_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = [name for name in sorted(weights) if "summary_query" in name][kept:]
    for name in missing:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (loaded, dash_dist.hf.load):
        with pytest.raises(ValueError, match="the checkpoint has no summary_query for layer"):
            load(tmp_path)


def test_a_checkpoint_without_another_tensor_is_refused(tmp_path):
    save(tiny_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model, such as model.norm.weight"):
        dash_dist.hf.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dash_attention": {"chunk_size": 24}}, "chunk_size is 24"),
        ({"dash_attention": {"stride": 8}}, "unknown keys stride"),
        ({"dash_attention": {"window": 8}}, "attention.kind has no window layer"),
        ({"dash_attention": [64]}, "give a dictionary"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, change, message):
    save(tiny_model(), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for load in (loaded, dash_dist.hf.load):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_windows_of_dash_layers_are_refused():
    with pytest.raises(ValueError, match="layer 0 is sliding_attention with sliding_window 8"):
        tiny_model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="layer 1 is sliding_attention with sliding_window 8"):
        tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)


def test_other_caches_and_packed_sequences_are_refused():
    model, ids = tiny_model(), tokens(1, 20)
    with pytest.raises(ValueError, match=r"is a StaticLayer: DashAttention needs a DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=torch.arange(20)[None] % 10, use_cache=False)


def test_dense_attention_of_a_dash_model_is_announced(tmp_path, caplog):
    save(tiny_model(), tmp_path)
    registration._warn_of_other_attention.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert "pass attn_implementation='dash_attention'" in caplog.text
    expected = tiny_model()(tokens(1, LENGTH)).logits
    model.set_attn_implementation("dash_attention")
    torch.testing.assert_close(model(tokens(1, LENGTH)).logits, expected, rtol=0, atol=0)


def test_offloaded_layers_keep_their_summaries():
    layer = DashCacheLayer()
    layer.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))
    layer.offload()
    layer.prefetch()
    assert layer.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16))[0].shape == (1, 2, 4, 16)


def test_other_versions_of_transformers_are_refused(monkeypatch):
    monkeypatch.setattr(registration.transformers, "__version__", "4.57.1")
    with pytest.raises(ConfigError, match=r"does not know transformers 4.57.1: pip install 'transformers>=5.0,<6'"):
        registration.register.__wrapped__()
