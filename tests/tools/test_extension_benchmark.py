"""The extension benchmark: configurations of its runs, and the documents with questions that they train on."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.data.tokenizer import ByteTokenizer
from tools.benchmarks.common.configurations import write_configuration
from tools.benchmarks.extension.__main__ import base_of
from tools.benchmarks.extension.corpus import COPIES, questions_of, write_copies, write_questions
from tools.benchmarks.extension.recipes import ATTENTION, SIZES, Base, Settings, extension, from_scratch, unchanged

MODEL = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "rotary_base": 1e4,
}


def loaded(settings: Settings, folder: Path) -> RunConfig:
    return load_config(write_configuration(settings, folder))


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """An imported model without a tokenizer, that is of bytes."""
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {**MODEL, "weights": "elsewhere"}}))
    return base_of(tmp_path)


@pytest.mark.parametrize("name", SIZES)
def test_every_run_is_a_configuration(name: str, base: Base, tmp_path: Path) -> None:
    size = SIZES[name]
    scratch = size.scratch
    stages = loaded(from_scratch(size, tmp_path), tmp_path).stage_list
    steps = (scratch.first_steps, scratch.first_steps, scratch.steps, scratch.question_steps)
    assert [stage.config.training.steps for stage in stages] == list(itertools.accumulate(steps))
    # A run that continues in its next stage takes a source of the same label for the same documents.
    sources = [one for stage in stages for one in stage.config.data.sources]
    assert len({one.title for one in sources}) == len({str(one.paths) for one in sources})
    assert set(size.evaluated) >= set(size.lengths)
    for attention in ATTENTION:
        found = [stage.config for stage in loaded(extension(size, tmp_path, base, attention), tmp_path).stage_list]
        assert [one.training.sequence_length for one in found] == list(size.lengths[1:])
        assert [one.model.positions.limit for one in found] == list(size.lengths[1:])
        assert {one.model.weights for one in found} == {tmp_path}
        bases = [one.model.rotary_base for one in found]
        # Of the frequencies base^(-2i / d), the last one is divided by the factor of the length.
        last = [value ** -(62 / 64) / 1e4 ** -(62 / 64) for value in bases]
        assert last == pytest.approx([size.lengths[0] / length for length in size.lengths[1:]], rel=1e-4)
    for length in (size.lengths[0], size.lengths[-1]):
        config = loaded(unchanged(size, tmp_path, base, "unchanged", length), tmp_path)
        assert (config.training.sequence_length, config.training.steps) == (length, 1)
    assert unchanged(size, tmp_path, base, "unchanged", size.lengths[0])["model"]["rotary_base"] == 1e4


def test_scaled_positions_are_refused(tmp_path: Path) -> None:
    positions = {"type": "linear", "factor": 2.0, "max_positions": 2048}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {**MODEL, "positions": positions}}))
    with pytest.raises(ValueError, match="scales its positions, by linear: give a model without"):
        base_of(tmp_path)
    with pytest.raises(ValueError, match="give a folder that `dash-dist import` wrote"):
        base_of(tmp_path / "absent")


def rows(file: Path) -> list[str]:
    """Return the texts of a file of conversations, whose answers are in brackets."""
    return [
        "".join(f"[{turn['content']}]" if turn["role"] == "assistant" else turn["content"] for turn in row["messages"])
        for row in map(json.loads, file.read_text().splitlines())
    ]


def test_questions_fill_their_length_and_have_their_answers_in_the_text(tmp_path: Path) -> None:
    write_questions(tmp_path, ByteTokenizer(), {384: 16, 1024: 8})
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
