"""The patterns of `trainable:` decide on every parameter once, and say what they did not find."""

import pytest
import yaml
from pydantic import ValidationError

from dash_dist.config.file import load_config
from dash_dist.config.model import ModelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.errors import ConfigError
from dash_dist.models.table import parameter_table
from tests.support.runs import TINY

SHAPE = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "num_kv_heads": 1}
NAMES = list(parameter_table(ModelConfig(**SHAPE), 50))


def section(*patterns: dict[str, object]) -> TrainableSection:
    return TrainableSection.model_validate({"parameters": patterns})


def test_everything_trains_by_default():
    assert TrainableSection().learning_rates(NAMES) == dict.fromkeys(NAMES)


def test_the_first_pattern_that_matches_decides():
    rates = section({"match": "*.layers.0.*", "lr": 1e-3}, {"match": "*linear_qkv.weight"}).learning_rates(NAMES)
    assert rates == {
        **{name: 1e-3 for name in NAMES if ".layers.0." in name},
        "decoder.layers.1.self_attention.linear_qkv.weight": None,
    }


@pytest.mark.parametrize(
    ("pattern", "miss"),
    [
        ("*sumary_query", "decoder.layers.*.self_attention.core_attention.attention.summary_query"),
        ("decoder.layers.*.self_atention.linear_qvk.weight", "decoder.layers.*.self_attention.linear_qkv.weight"),
        ("embeddings.*", "embedding.word_embeddings.weight"),
    ],
)
def test_a_pattern_without_a_match_is_refused_with_near_misses(pattern, miss):
    with pytest.raises(ValueError, match="trainable") as caught:
        section({"match": pattern}).learning_rates(NAMES)
    message = str(caught.value)
    assert message.startswith(f"trainable.parameters: {pattern} matches no parameter; near misses are {miss}")


def test_a_pattern_behind_a_larger_one_is_refused():
    with pytest.raises(ValueError, match=r"earlier patterns match all 2 parameters of \*fc1\.weight: put it before"):
        section({"match": "*.mlp.*"}, {"match": "*fc1.weight", "lr": 1.0}).learning_rates(NAMES)


@pytest.mark.parametrize(
    "given", [{"parameters": []}, {"parameters": [{"match": ""}]}, {"parameters": [{"match": "*", "lr": 0.0}]}]
)
def test_empty_lists_and_patterns_are_refused(given):
    with pytest.raises(ValidationError):
        TrainableSection.model_validate(given)


def test_adapters_freeze_all_but_the_routing():
    with_adapters = TrainableSection.model_validate({"lora": {}})
    assert with_adapters.learning_rates(NAMES).keys() == {name for name in NAMES if name.endswith("summary_query")}
    chosen = TrainableSection.model_validate({"lora": {}, "parameters": [{"match": "*norm.weight"}]})
    assert chosen.learning_rates(NAMES).keys() == {name for name in NAMES if "norm.weight" in name}


def test_adapters_are_read_from_yaml_and_named_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "trainable": {"lora": {"linears": ["q_proj"], "alpha": 8}}}))
    lora = load_config(path).trainable.lora
    assert lora.linears == ("q_proj",)
    assert lora.scale == 0.5
    with pytest.raises(ConfigError, match=r"trainable\.lora\.linears.*names a linear twice"):
        load_config(path, ["trainable.lora.linears=[q_proj, q_proj]"])
