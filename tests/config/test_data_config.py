"""Options that do not go together are refused with the one to change."""

import pytest
from pydantic import ValidationError

from dash_dist.config.data import DataConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "files"}, "needs data.paths"),
        ({"paths": ["a.txt"]}, "read only with data.source=files, not stdlib"),
        ({"format": "jsonl"}, "data.format=jsonl is read only with"),
        ({"source": "hub"}, "needs data.name"),
        ({"source": "hub", "name": "a/b", "shuffle_seed": 1}, "drop data.shuffle_seed"),
        ({"name": "a/b"}, "data.name=a/b is read only with data.source=hub"),
        ({"split": "test"}, "data.split=test is read only with"),
        ({"text_column": "body"}, "text files have no columns"),
        (
            {"source": "files", "paths": "a", "format": "text", "text_column": "b"},
            "text files have no columns",
        ),
        ({"end_of_document": "</s>"}, "bytes tokenizer has its own"),
        ({"shuffle_seed": -1}, "greater than or equal to 0"),
        ({"undecodable": "ignore"}, "'skip' or 'error'"),
        ({"documents": "packed"}, "'joined' or 'separate'"),
        ({"batch_size": 3}, "Extra inputs are not permitted"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**options)


def test_a_resolved_config_can_be_read_back():
    for config in (
        DataConfig(),
        DataConfig(source="files", paths="a.jsonl", text_column="body", shuffle_seed=0),
        DataConfig(source="hub", name="a/b", subset="en", revision="main"),
    ):
        assert DataConfig(**config.model_dump(mode="json")) == config
