"""The section `evaluation:`: its defaults, its settings taken from the run's data, and what it refuses."""

import re

import pytest
import yaml

from dash_dist.config.evaluation import EvaluationSection
from dash_dist.config.file import load_config, to_yaml
from dash_dist.errors import ConfigError
from tests.support.runs import write_config

HELD_OUT = ["evaluation.interval=5", "evaluation.data.source=files", "evaluation.data.paths=[held.txt]"]


@pytest.mark.parametrize(
    ("length", "buckets", "edges"),
    [
        (256, (), (256,)),
        (4096, (), (4096,)),
        (5000, (), (4096, 5000)),
        (32768, (), (4096, 8192, 16384, 32768)),
        (100_000, (), (4096, 8192, 16384, 32768, 65536, 100_000)),
        (256, (64, 128), (64, 128, 256)),
        (256, (64, 256), (64, 256)),
    ],
)
def test_buckets_end_with_the_sequence(length, buckets, edges):
    assert EvaluationSection(buckets=buckets).edges(length) == edges


def test_there_is_none_by_default(tmp_path):
    evaluation = load_config(write_config(tmp_path)).evaluation
    assert (evaluation.interval, evaluation.data) == (None, None)


def test_settings_of_the_tokens_are_those_of_the_data(tmp_path):
    overrides = ["data.special_tokens=true", "data.tokenizer=tok.json", "data.documents=separate"]
    config = load_config(write_config(tmp_path), [*overrides, *HELD_OUT])
    data = config.evaluation.data
    assert (data.special_tokens, data.tokenizer, data.documents) == (True, "tok.json", "separate")
    joined = load_config(write_config(tmp_path), [*overrides, *HELD_OUT, "evaluation.data.documents=joined"])
    assert joined.evaluation.data.documents == "joined"
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved) == config
    assert yaml.safe_load(resolved.read_text())["evaluation"]["data"]["tokenizer"] == "tok.json"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.interval=5"], "evaluation.interval = 5 needs evaluation.data: name documents"),
        ([*HELD_OUT, "evaluation.data.tokenizer=other.json"], "evaluation.data.tokenizer = other.json and data.tok"),
        ([*HELD_OUT, "evaluation.data.special_tokens=true"], "drop evaluation.data.special_tokens"),
        ([*HELD_OUT, "evaluation.buckets=[128, 64]"], "is not ascending: sort it"),
        ([*HELD_OUT, "evaluation.buckets=[64, 512]"], "names 512, and training.sequence_length is 256"),
        ([*HELD_OUT, "evaluation.sequences=3", "training.micro_batch_size=2"], "1 x 2: set it to 4"),
        (["evaluation.interval=5", "evaluation.data.source=stdlib"], "reads stdlib, which is trained on"),
        ([*HELD_OUT, "evaluation.data.shufle_seed=1"], "did you mean evaluation.data.shuffle_seed?"),
        (
            [*HELD_OUT, "evaluation.data.documents=separate", "training.micro_batch_size=2"],
            "set training.micro_batch_size to 1",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write_config(tmp_path), overrides)


def test_sequences_must_fill_every_data_parallel_rank(tmp_path):
    config = load_config(write_config(tmp_path), [*HELD_OUT, "evaluation.sequences=3"])
    config.check_world_size(2)
    with pytest.raises(ValueError, match=r"evaluation\.sequences = 3 .* = 2 x 1: set it to 4"):
        config.check_world_size(4)
