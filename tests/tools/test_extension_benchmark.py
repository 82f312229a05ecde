"""The extension benchmark: configurations of its runs, and the documents with questions that they train on."""

import json
from pathlib import Path

import pytest

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from tools.benchmarks.common.configurations import write_configuration
from tools.benchmarks.extension.corpus import COPIES, questions_of, write_copies, write_questions
from tools.benchmarks.extension.recipes import SIZES, Settings, extension, from_scratch, untrained


def loaded(settings: Settings, folder: Path) -> RunConfig:
    return load_config(write_configuration(settings, folder))


@pytest.mark.parametrize("name", SIZES)
def test_every_run_is_a_configuration(name: str, tmp_path: Path) -> None:
    size = SIZES[name]
    stages = loaded(from_scratch(size, tmp_path), tmp_path).stage_list
    assert [stage.config.training.steps for stage in stages] == [
        size.first_steps,
        2 * size.first_steps,
        2 * size.first_steps + size.steps[0],
    ]
    # A run that continues in its next stage takes a source of the same label for the same documents.
    labels = [one.title for stage in stages for one in stage.config.data.sources]
    assert len(set(labels)) == len(labels)
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
        rows = [json.loads(line) for line in (tmp_path / questions_of(length)).read_text().splitlines()]
        assert len({row["prompt"] for row in rows}) == count
        for row in rows:
            assert len((row["prompt"] + row["completion"]).encode()) == length - 1
            assert row["completion"][-7:].isdigit()


def test_copies_fill_their_length_with_one_text(tmp_path: Path) -> None:
    write_copies(tmp_path, 20, 64)
    rows = [json.loads(line) for line in (tmp_path / COPIES).read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 20
    for row in rows:
        text, period = row["prompt"] + row["completion"], len(row["prompt"])
        assert len(text) == 63
        assert text[period:] == text[: len(text) - period]
