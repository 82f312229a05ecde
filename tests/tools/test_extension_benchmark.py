"""The extension benchmark: configurations of its runs, and the documents with questions that they train on."""

import json
from pathlib import Path

import pytest

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from tools.benchmarks.common.configurations import write_configuration
from tools.benchmarks.extension.corpus import questions_of, write_questions
from tools.benchmarks.extension.recipes import SIZES, Settings, extension, from_scratch, untrained


def loaded(settings: Settings, folder: Path) -> RunConfig:
    return load_config(write_configuration(settings, folder))


@pytest.mark.parametrize("name", SIZES)
def test_every_run_is_a_configuration(name: str, tmp_path: Path) -> None:
    size = SIZES[name]
    first, second = loaded(from_scratch(size, tmp_path), tmp_path).stage_list
    assert (first.config.training.steps, second.config.training.steps) == (
        size.first_steps,
        size.first_steps + size.steps[0],
    )
    # A run that continues in its second stage takes a source of the same label for the same documents.
    assert {one.label for one in first.config.data.sources}.isdisjoint(one.label for one in second.config.data.sources)
    for kind in ("dash", "dense"):
        lengths = [
            stage.config.training.sequence_length
            for stage in loaded(extension(size, tmp_path, tmp_path, kind), tmp_path).stage_list
        ]
        assert lengths == list(size.lengths[1:])
    assert loaded(untrained(size, tmp_path, tmp_path), tmp_path).training.sequence_length == size.lengths[-1]


def test_documents_with_questions_have_their_length_and_end_with_an_answer(tmp_path: Path) -> None:
    write_questions(tmp_path, {384: 8, 1024: 4})
    for length, count in ((384, 8), (1024, 4)):
        texts = [json.loads(line)["text"] for line in (tmp_path / questions_of(length)).read_text().splitlines()]
        assert len(set(texts)) == count
        for text in texts:
            assert len(text.encode()) == length
            assert text[-7:].isdigit()
