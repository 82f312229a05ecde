"""The authors' layout, read and written."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import dash_dist.hf
from dash_dist.hf.released import from_released, to_released
from tests.hf.tiny import SETTINGS, save, tiny_model, tokens

RELEASED = {"chunk_size": 64, "estimate_diagonal": True, "sigma": 1e6, "scaling_factor": 2.0}


def released(**changes):
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2).to_dict() | RELEASED | changes
    return {"model.layers.0.self_attn.indexer_q": torch.arange(16.0), "model.norm.weight": torch.ones(32)}, config


def test_the_four_keys_and_the_parameter_become_ours():
    tensors, config = from_released(*released(attn_implementation="dash_attn"))
    assert config["dash_attention"] == {"chunk_size": 64, "alpha": 1.5, "routing_scale": 2.0, "prior_sigma": 1e6}
    assert not (RELEASED.keys() | {"attn_implementation"}) & config.keys()
    query = tensors.pop("model.layers.0.self_attn.summary_query")
    assert query.tolist() == torch.arange(16.0).view(2, 8).tolist()
    assert list(tensors) == ["model.norm.weight"]


def test_keys_that_are_left_out_have_the_values_of_the_package():
    tensors, config = released()
    _, config = from_released(tensors, {key: value for key, value in config.items() if key not in RELEASED})
    assert config["dash_attention"] == {"chunk_size": 64, "alpha": 1.5, "routing_scale": 1.0, "prior_sigma": None}


@pytest.mark.parametrize("changes", [{}, {"estimate_diagonal": False}, {"chunk_size": 16, "sigma": 4.0}])
def test_released_layout_survives_a_round_trip(changes):
    tensors, config = released(**changes)
    again, again_config = to_released(*from_released(tensors, config))
    assert again_config == config
    assert {name: tensor.tolist() for name, tensor in again.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("prior_sigma", [None, 1e6])
def test_an_exported_model_survives_a_round_trip(tmp_path, prior_sigma):
    model = tiny_model(settings=SETTINGS | {"prior_sigma": prior_sigma})
    save(model, tmp_path / "ours")
    tensors, config = to_released(load_file(tmp_path / "ours" / "model.safetensors"), model.config.to_dict())
    assert tensors["model.layers.1.self_attn.indexer_q"].shape == (32,)
    tensors, config = from_released(tensors, config)
    (tmp_path / "again").mkdir()
    save_file(tensors, tmp_path / "again" / "model.safetensors", metadata={"format": "pt"})
    LlamaConfig(**config).save_pretrained(tmp_path / "again")
    ids = tokens(1, 60)
    with torch.no_grad():
        found = dash_dist.hf.load(tmp_path / "again")(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=0)


def test_models_that_do_not_fit_are_refused():
    tensors, config = released()
    with pytest.raises(ValueError, match="model_type is 'qwen2'"):
        from_released(tensors, config | {"model_type": "qwen2"})
    with pytest.raises(ValueError, match=r"indexer_q has 16 values: 4 KV heads of 8 make 32"):
        from_released(tensors, config | {"num_key_value_heads": 4})
    with pytest.raises(ValueError, match=r"no tensor is named \*.self_attn.indexer_q"):
        from_released({"model.norm.weight": torch.ones(32)}, config)
    with pytest.raises(ValueError, match="chunk_size is 20"):
        from_released(tensors, config | {"chunk_size": 20})
    ours = from_released(tensors, config)
    with pytest.raises(ValueError, match=r"alpha is 2.0: the released package computes 1.5 only"):
        to_released(ours[0], ours[1] | {"dash_attention": {"alpha": 2.0}})
    with pytest.raises(ValueError, match="attend_first_chunk is true: the released package routes to the first chunk"):
        to_released(ours[0], ours[1] | {"dash_attention": {"attend_first_chunk": True}})
    with pytest.raises(ValueError, match="the layers are of kind dense: the released package computes dash in all"):
        to_released(ours[0], ours[1] | {"dash_attention": {"kind": "dense"}})
    with pytest.raises(ValueError, match=r"no tensor is named \*.self_attn.summary_query"):
        to_released({}, ours[1])
