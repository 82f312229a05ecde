"""The extension benchmark: configurations of its runs, and the documents with questions that they train on."""

import itertools
import json
import re
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
    steps = (size.first_steps, size.first_steps, size.steps[0], size.question_steps)
    assert [stage.config.training.steps for stage in stages] == list(itertools.accumulate(steps))
    # A run that continues in its next stage takes a source of the same label for the same documents.
    sources = [one for stage in stages for one in stage.config.data.sources]
    assert len({one.title for one in sources}) == len({str(one.paths) for one in sources})
    assert set(size.evaluated) >= set(size.lengths)
    for kind in ("dash", "dense"):
        lengths = [
            stage.config.training.sequence_length
            for stage in loaded(extension(size, tmp_path, tmp_path, kind), tmp_path).stage_list
        ]
        assert lengths == list(size.lengths[1:])
    assert loaded(untrained(size, tmp_path, tmp_path), tmp_path).training.sequence_length == size.lengths[-1]


def rows(file: Path) -> list[str]:
    """Return the texts of a file of conversations, whose answers are in brackets."""
    return [
        "".join(f"[{turn['content']}]" if turn["role"] == "assistant" else turn["content"] for turn in row["messages"])
        for row in map(json.loads, file.read_text().splitlines())
    ]


def test_questions_fill_their_length_and_have_their_answers_in_the_text(tmp_path: Path) -> None:
    write_questions(tmp_path, {384: 16, 1024: 8})
    for length, count in ((384, 16), (1024, 8)):
        texts = rows(tmp_path / questions_of(length))
        assert len(set(texts)) == count
        for text in texts:
            assert len(re.sub(r"[\[\]]", "", text)) == length - 1
            for answer in re.findall(r"\[(.*?)\]", text):
                assert all(f"is {number}." in text.replace("[", "") for number in answer.strip().split(", "))
        asked = [re.findall(r"The number of (\w+) is\[ (\d+)\]", text) for text in texts[1::2]]
        assert all(
            f"The number of {name} is {number}." in text
            for text, found in zip(texts[1::2], asked, strict=True)
            for name, number in found
        )
        assert {len(found) for found in asked} == {(length - 1) // 64 // 2}


def test_copies_fill_their_length_with_one_text(tmp_path: Path) -> None:
    write_copies(tmp_path, 20, 64)
    texts = rows(tmp_path / COPIES)
    assert len(set(texts)) == 20
    for text in texts:
        period, whole = text.index("["), re.sub(r"[\[\]]", "", text)
        assert len(whole) == 63
        assert whole[period:] == whole[: len(whole) - period]
