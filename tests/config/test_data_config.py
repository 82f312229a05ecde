"""Options that do not go together are refused with the one to change."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from dash_dist.config.data import DataConfig
from dash_dist.config.file import load_config, to_yaml
from dash_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "files"}, "needs data.paths"),
        ({"source": "megatron"}, "data.source=megatron needs data.paths"),
        ({"paths": ["a.txt"]}, "read only with data.source=files or megatron, not stdlib"),
        ({"source": "hub", "name": "a/b", "paths": "a"}, "read only with data.source=files or megatron, not hub"),
        ({"format": "jsonl"}, "data.format=jsonl is read only with"),
        ({"source": "megatron", "paths": "a", "format": "jsonl"}, "data.format=jsonl is read only with"),
        ({"source": "hub"}, "needs data.name"),
        ({"name": "a/b"}, "data.name=a/b is read only with data.source=hub"),
        ({"split": "test"}, "data.split=test is read only with"),
        ({"text_column": "body"}, "text files have no columns"),
        ({"source": "megatron", "paths": "a", "text_column": "body"}, "text files have no columns"),
        ({"source": "files", "paths": "a", "format": "text", "text_column": "b"}, "text files have no columns"),
        ({"source": "files", "paths": "a", "text_column": ""}, "at least 1 character"),
        ({"end_of_document": "</s>"}, "bytes tokenizer has its own"),
        ({"shuffle_seed": -1}, "greater than or equal to 0"),
        ({"damaged": "ignore"}, "'skip' or 'stop'"),
        ({"documents": "packed"}, "'joined' or 'separate'"),
        ({"batch_size": 3}, "Extra inputs are not permitted"),
        ({"lookahead": 3}, "data.lookahead is read only with data.documents=separate"),
        ({"long_documents": "drop"}, "data.long_documents is read only with data.documents=separate"),
        ({"length_buckets": [3]}, "data.length_buckets is read only with data.documents=separate"),
        ({"documents": "separate", "lookahead": 0}, "greater than or equal to 1"),
        ({"documents": "separate", "long_documents": "cut"}, "'split' or 'drop'"),
        ({"documents": "separate", "length_buckets": [8, 4]}, "is not ascending"),
        ({"documents": "separate", "length_buckets": [4, 4]}, "is not ascending"),
        ({"documents": "separate", "length_buckets": [0]}, "greater than 0"),
        ({"temperature": 2}, "data.temperature is read only with data.sources"),
        ({"rows": "messages"}, "data.rows=messages needs rows: set data.source to files or hub"),
        (
            {"source": "files", "paths": "a", "format": "text", "rows": "completions"},
            "data.rows=completions needs rows",
        ),
        ({"source": "megatron", "paths": "a", "rows": "messages"}, "data.rows=messages needs rows"),
        ({"source": "files", "paths": "a", "rows": "chat"}, "'text', 'messages' or 'completions'"),
        (
            {"source": "files", "paths": "a", "chat_template": "t"},
            "chat_template=t is read only with",
        ),
        ({"source": "files", "paths": "a", "prompt_column": "q"}, "only with data.rows=completions, not text"),
        (
            {"source": "files", "paths": "a", "rows": "messages", "text_column": "q"},
            "data.text_column=q is read only with data.rows=text, not messages",
        ),
        ({"length_weights": {0: 2}}, "greater than 0"),
        ({"length_weights": {4: 0}}, "greater than 0"),
        ({"length_weights": {4: 2}, "shuffle_seed": None}, "data.length_weights needs an order by chance"),
        ({"cut_documents": 1}, "greater than or equal to 2"),
        ({"cut_documents": 64, "shuffle_seed": None}, "data.cut_documents needs an order by chance: set data.shuffle"),
        (
            {"sources": [{"paths": "a"}], "length_weights": {4: 2}},
            "data.length_weights and data.sources are both given",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**options)


A, B = {"paths": "a"}, {"paths": "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": [A, A]}, "two sources are named 'a': give each a label"),
        ({"sources": [A, {"paths": "b", "label": "a"}]}, "two sources are named 'a'"),
        ({"sources": [{**A, "weight": 1}, B]}, "give weight .* to every source or to none"),
        ({"sources": [{**A, "epochs": 1}, B]}, "to every source or to none"),
        ({"sources": [{**A, "epochs": 1, "weight": 1}, {**B, "epochs": 1, "weight": 1}]}, "not both"),
        ({"sources": [{**A, "epochs": 0}]}, "greater than 0"),
        ({"sources": [{**A, "weight": -1}]}, "greater than 0"),
        ({"sources": [{**A, "weight": 1}], "temperature": 2}, "data.temperature is read only where"),
        ({"sources": [A, B], "temperature": 0}, "greater than 0"),
        ({"sources": [A, B], "paths": "c", "source": "files"}, "data.source and data.sources are both given"),
        ({"sources": [A, {"source": "files"}]}, "data.source=files needs data.paths"),
        ({"sources": [{**A, "tokenizer": "bytes"}]}, "Extra inputs are not permitted"),
    ],
)
def test_refused_sources(options, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**options)


def test_one_source_is_a_mixture_of_one():
    (source,) = DataConfig(source="files", paths="a.jsonl", text_column="body").all_sources
    assert (source.source, source.paths, source.text_column, source.title) == ("files", ("a.jsonl",), "body", "a.jsonl")
    first, second, third = DataConfig(
        sources=[A, {"source": "hub", "name": "a/b"}, {"source": "stdlib", "label": "code"}]
    ).all_sources
    assert (first.title, second.title, third.title) == ("a", "a/b", "code")


def test_a_resolved_config_can_be_read_back():
    for config in (
        DataConfig(),
        DataConfig(source="files", paths="a.jsonl", text_column="body", shuffle_seed=0),
        DataConfig(source="hub", name="a/b", subset="en", revision="main", cut_documents=4096),
        DataConfig(source="megatron", paths=["a", "b"], cache="folder", special_tokens=True),
        DataConfig(sources=[{**A, "epochs": 2}, {**B, "epochs": 0.5, "label": "x"}], damaged="stop"),
        DataConfig(sources=[A, B], temperature=2, documents="separate", length_buckets=[4, 8], shuffle_seed=None),
    ):
        assert DataConfig(**config.model_dump(mode="json")) == config


def test_paths_and_weights_of_a_resolved_configuration_are_read_again(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text((Path(__file__).parents[2] / "configs" / "demo.yaml").read_text())
    source = "{paths: [a.jsonl], rows: messages, chat_template: t.jinja, length_weights: {4096: 2, 32768: 2.5}}"
    config = load_config(path, ["data.source=stdlib", f"data.sources=[{source}]", "data.cache=tokens"])
    (one,) = config.data.sources
    assert (one.chat_template, config.data.cache) == (Path("t.jinja"), Path("tokens"))
    assert one.length_weights == {4096: 2.0, 32768: 2.5}
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    path.write_text(path.read_text().replace("'4096'", "many"))
    with pytest.raises(ConfigError, match="length_weights"):
        load_config(path)
