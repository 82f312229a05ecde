"""Models with dash, dense and window layers: logits, decoding with a cache for each kind, padding, generation."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dash_dist.hf.cache import DashCacheLayer
from dash_kernels import reference_dash_attention
from dash_kernels.reference import reference_window_attention
from tests.hf.tiny import CHUNK, SETTINGS, save, tiny_config, tiny_model, tokens

LENGTH = 5 * CHUNK + 7
WINDOW = 21
KINDS = ("window", "dash", "dense", "window")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "settings": {**SETTINGS, "kind": list(KINDS), "window": WINDOW},
}
NATIVE = {  # as an export spells them
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", CONFIG),
    "qwen3": ("qwen3", CONFIG | NATIVE),
    "mistral": ("mistral", CONFIG),
    "olmo3": ("olmo3", CONFIG | {name: NATIVE[name] for name in ("sliding_window", "layer_types")}),
    "mistral, all windows": (
        "mistral",
        {"settings": {**SETTINGS, "kind": "window", "window": WINDOW}, "sliding_window": WINDOW},
    ),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def model_of(name: str) -> Any:
    family, config = MODELS[name]
    return tiny_model(family, **config)


def reference(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, scaling: float, **__: Any):
    """The float64 references in the place of `attention_forward`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    settings = dict(module.config.dash_attention)
    kind, window = settings.pop("kind"), settings.pop("window")
    kind = kind if isinstance(kind, str) else kind[module.layer_idx]
    if kind == "dash":
        return reference_dash_attention(q, k, v, module.summary_query, softmax_scale=scaling, **settings)[0], None
    return reference_window_attention(q, k, v, window=window if kind == "window" else k.shape[1]), None


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_references(name, tmp_path, monkeypatch):
    folder = save(model_of(name), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dash_attention").double()
    ids = tokens(2, LENGTH)
    found = model(ids).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "dash_attention", reference)
    expected = model(ids, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    names = [key for key in model.state_dict() if "summary_query" in key]
    assert names == ([] if "all windows" in name else ["model.layers.1.self_attn.summary_query"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 23])
def test_decoding_and_chunked_prefill_equal_one_call(name, size):
    model, ids = model_of(name), tokens(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    found = [model(piece, past_key_values=cache).logits for piece in ids.split(size, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)
    windowed = DynamicSlidingWindowLayer if name in ("qwen3", "olmo3", "mistral, all windows") else DynamicLayer
    types = {"window": windowed, "dash": DashCacheLayer, "dense": DynamicLayer}
    kinds = KINDS if len(cache.layers) == 4 else ("window", "window")
    assert [type(layer) for layer in cache.layers] == [types[kind] for kind in kinds]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(name, side):
    model = model_of(name)
    rows = [tokens(1, length, seed=length)[0] for length in (LENGTH, 40, 9)]
    ids, mask = torch.zeros(2, len(rows), LENGTH, dtype=torch.int64)
    for row, row_tokens in enumerate(rows):
        place = slice(LENGTH - len(row_tokens), None) if side == "left" else slice(len(row_tokens))
        ids[row, place], mask[row, place] = row_tokens, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, row_tokens in enumerate(rows):
        alone = model(row_tokens[None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_a_left_padded_batch_generates_what_its_rows_do(name, how):
    model = model_of(name)
    rows = [tokens(1, length, seed=length)[0] for length in (40, 3)]
    ids, mask = torch.zeros(2, 2, 40, dtype=torch.int64)
    for row, row_tokens in enumerate(rows):
        ids[row, 40 - len(row_tokens) :], mask[row, 40 - len(row_tokens) :] = row_tokens, 1
    settings = {"max_new_tokens": 30, "pad_token_id": 0, **how}
    together = model.generate(ids, attention_mask=mask, **settings)[:, 40:]
    for row, row_tokens in enumerate(rows):
        alone = model.generate(row_tokens[None], attention_mask=torch.ones(1, len(row_tokens)).long(), **settings)
        assert torch.equal(together[row], alone[0, len(row_tokens) :])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"settings": {**SETTINGS, "kind": ["window", "dash", "dash"], "window": 4}}, "attention.kind has 3 entries"),
        ({"settings": {**SETTINGS, "kind": "window"}}, "attention.window is not set"),
        ({"settings": SETTINGS, **NATIVE}, "layer 0 is sliding_attention with sliding_window 21, and dash_attention"),
        ({"settings": {**SETTINGS, "kind": "window", "window": 4}, **NATIVE}, "makes it a window of 4"),
    ],
)
def test_kinds_that_contradict_are_refused(others, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("qwen3", num_hidden_layers=4, **others)


def test_packed_sequences_and_static_caches_are_refused():
    model, ids = model_of("qwen3"), tokens(1, 40)
    restarting = torch.cat([torch.arange(25), torch.arange(15)])[None]
    with pytest.raises(ValueError, match="as for packed sequences"):
        model(ids, position_ids=restarting, use_cache=False)
    windows = model_of("mistral, all windows")
    with pytest.raises(ValueError, match="packed sequences"):
        windows(ids, position_ids=restarting, use_cache=False)
    with pytest.raises(ValueError, match="layer 0 of the cache is a StaticSlidingWindowLayer"):
        windows(ids, past_key_values=StaticCache(config=windows.config, max_cache_len=64))


def test_configuration_survives_saving(tmp_path):
    config = tiny_config("qwen3", CONFIG["settings"], num_hidden_layers=4, **NATIVE)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).dash_attention == CONFIG["settings"]
