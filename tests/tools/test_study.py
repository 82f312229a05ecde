"""The study of quality: its texts, its results and tables."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.context_parallel import DashAttention
from dash_dist.data.prepare import prepare_here
from dash_dist.data.tokenizer import ByteTokenizer
from dash_kernels import AttentionSpec
from dash_kernels.selection import InfLLMv2, TopChunks
from tools.benchmarks.common.configurations import write_configuration
from tools.study.corpora import held_out_text, write_corpus
from tools.study.methods import methods
from tools.study.parts import Cell, cells, parts
from tools.study.probe import attention_of
from tools.study.recipes import settings_of
from tools.study.results import OtherSettings, Results
from tools.study.sizes import SIZES
from tools.study.table import as_markdown
from tools.study.tasks import TASKS
from tools.study.text import QUESTION

SIZE = SIZES["cpu"]
CELL, PLANNED = 64, 8192


def solve(task: str, facts: list[tuple[int, str, str]], key: str, sign: str) -> str:
    """Answer a question from the facts of its text."""
    if task == "variables":
        source = next(rest for _, name, rest in facts if name == key)
        return source if len(source) == 1 else solve(task, facts, source, sign)
    values = [rest[:1] for _, name, rest in facts if name == key]
    match task:
        case "recall" | "needle":
            (value,) = values
            return value
        case "missing":
            everything = "abcdefghijklmnopqrstuvwxyzABCDEFG"[: 2 ** "!#$%&*".index(sign) + 1]
            (value,) = set(everything) - set(values)
            return value
        case "overwritten":
            return values[-1]
    (value, most), *others = Counter(values).most_common()
    assert all(count < most for _, count in others)
    return value


@pytest.mark.parametrize("length", [2048, 8192, 16384])
@pytest.mark.parametrize("task", TASKS)
def test_questions_have_the_answers_that_follow_from_the_facts(task: str, length: int) -> None:
    text = TASKS[task].text("some seed", length=length, planned=PLANNED, cell=CELL)
    assert len(text.text) == length - 1
    begin = length - 1 - QUESTION * len(text.questions)
    pattern = r";(..)(\w)" if TASKS[task].distractors else r"[;:](..)(\w+)"
    facts = [(found.start(), found[1], found[2]) for found in re.finditer(pattern, text.text[:begin])]
    keys = Counter(key for _, key, _ in facts)
    if task != "variables":  # half of the keys are asked for: else those not yet asked for would tell the last answers
        assert len(keys) // 2 <= len(text.questions) <= (len(keys) + 1) // 2 + 1
    assert sum(len(question.evidence) for question in text.questions) < 0.75 * len(facts)
    for number, question in enumerate(text.questions):
        sign, first, second, answer = text.text[begin + QUESTION * number :][:QUESTION]
        assert question.place == begin + QUESTION * number + 3
        assert answer == question.answer == solve(task, facts, first + second, sign)
        if task != "variables":
            assert keys[first + second] == TASKS[task].facts(question.difficulty) == len(question.evidence)
        assert all(place < begin for place in question.evidence)
        if TASKS[task].apart:  # as many chunks are needed as there are facts
            assert len({place // CELL for place in question.evidence}) == len(question.evidence)
    if TASKS[task].one_per_cell:
        assert len({place // CELL for place, *_ in facts}) == len(facts)
    if length >= PLANNED:
        assert {question.difficulty for question in text.questions} == set(TASKS[task].difficulties)


@pytest.mark.parametrize("task", TASKS)
def test_first_texts_have_few_facts_and_many_questions(task: str) -> None:
    texts = [TASKS[task].first_text(f"seed {number}") for number in range(50)]
    assert {len(text.text) for text in texts} == {TASKS[task].first_length - 1}
    questions = 2 if task == "frequent" else 8
    assert all(len(text.questions) == questions and text.questions[-1].place == len(text.text) - 1 for text in texts)
    assert len({text.text for text in texts}) == len(texts)
    if task == "recall":
        assert all(len(re.findall(r";..\w", text.text)) == 4 for text in texts)


def test_no_fact_less_tells_which_value_is_missing() -> None:
    text = TASKS["missing"].text("some seed", length=8192, planned=PLANNED, cell=CELL)
    for question in text.questions:
        values = {text.text[place] for place in question.evidence}
        assert len(values) == question.difficulty
        assert question.answer not in values


def test_longer_texts_have_the_same_questions_further_apart() -> None:
    short, long = (TASKS["missing"].text("s", length=length, planned=8192, cell=CELL) for length in (8192, 32768))
    answers = [sorted((one.answer, one.difficulty) for one in text.questions) for text in (short, long)]
    assert answers[0] == answers[1]
    assert max(question.evidence[-1] for question in long.questions) > 16384


def test_texts_depend_on_their_seed_and_those_held_out_are_others(tmp_path: Path) -> None:
    digests = {write_corpus(tmp_path / name, "overwritten", SIZE) for name in "ab"}
    assert len(digests) == 1
    trained = {
        "".join(message["content"] for message in json.loads(line)["messages"])
        for path in (tmp_path / "a" / "overwritten").glob("*.jsonl")
        for line in path.read_text().splitlines()
    }
    assert len(trained) == SIZE.copies + SIZE.first_texts + sum(SIZE.texts.values())
    for length in SIZE.texts:
        for index in range(4):
            text = held_out_text("overwritten", SIZE, length, index)
            assert text == held_out_text("overwritten", SIZE, length, index)
            assert text.text not in trained
    with pytest.raises(ValueError, match="64 tokens in cells of 32 are too few"):
        TASKS["missing"].text("seed", length=64, planned=512, cell=32)


def test_answers_alone_count_in_the_loss(tmp_path: Path) -> None:
    write_corpus(tmp_path, "recall", SIZE)
    settings = settings_of(Cell("recall", "recall", "dense", 0), SIZE, tmp_path)
    copies, first, *_, texts = (
        prepare_here(data, ByteTokenizer()).sources for data in loaded(settings, tmp_path).all_data
    )
    lengths = {"copies": SIZE.copied, "first": TASKS["recall"].first_length}
    lengths |= {str(length): length for length in SIZE.texts}
    sources = [*copies.items(), *first.items(), *texts.items()]
    for (title, source), (name, length) in zip(sources, lengths.items(), strict=True):
        rows = (tmp_path / "recall" / f"{name}.jsonl").read_text().splitlines()
        messages = [message for row in rows for message in json.loads(row)["messages"]]
        answers = [message for message in messages if message["role"] == "assistant"]
        assert source.record.loss_tokens == sum(len(answer["content"]) for answer in answers), title
        assert source.record.tokens == length * len(rows)


def loaded(settings: dict[str, Any], folder: Path) -> RunConfig:
    return load_config(write_configuration(settings, folder))


def test_every_method_has_a_configuration(tmp_path: Path) -> None:
    size = SIZES["gpu"]
    asked = {cell.method: cell for cell in cells(list(parts(size).values()), 1)}
    assert asked.keys() == methods(size).keys()
    others = [Cell(corpus, corpus, "dense", 0) for corpus in size.code_lengths]
    for cell in [*asked.values(), *others]:
        config = loaded(settings_of(cell, size, tmp_path), tmp_path)
        training = size.tasks if cell.corpus in TASKS else size.language
        assert config.training.tokens_per_step == training.tokens, cell
    assert [cell.seed for cell in cells([parts(size)["recall"]], 2, ("dense", "dash-1"))] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"dense": True},
        {"spec": AttentionSpec(routing_scale=4.0)},
        {"spec": AttentionSpec(routing_scale=8.0, prior_sigma=3.0)},
        {"spec": AttentionSpec(routing_scale=8.0, prior_sigma=3.0, attend_first_chunk=True)},
        {"spec": AttentionSpec(selection=TopChunks(3))},
        {"spec": AttentionSpec(selection=InfLLMv2(4, first_chunks=1, local_chunks=1, dense_length=0))},
    ],
)
def test_the_probed_attention_gives_the_output_of_the_module(settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    module = DashAttention(2, 16, chunk_size=16, **settings)
    torch.nn.init.normal_(module.summary_query)
    q, k, v = (torch.randn(1, 150, heads, 16) for heads in (4, 2, 2))
    places = [70, 97, 149]
    weights, selected = attention_of(module, q, k, None, places)
    out = torch.einsum("hpt,thd->phd", weights, v[0].repeat_interleave(2, dim=1))
    module.record_routing = True
    expected = module(q, k, v)
    torch.testing.assert_close(out, expected[0, places], atol=1e-5, rtol=1e-4)
    if module.routing is not None:
        assert selected.sum(-1).T.tolist() == module.routing.selected_per_token[0, places].tolist()


def record(method: str, seed: int, correct: int) -> dict[str, Any]:
    """A result of the task `overwritten` at the size for a CPU, in which half of the questions are hard."""
    layers = [{"mass": mass, "entropy": 1.0, "found": 0.5, "summary_query_norm": 0.0} for mass in (0.25, correct / 10)]
    score = {"attention": {}, "asked": {"1": 10, "8": 10}, "density": 0.5, "seconds": 0.001, "layers": layers}
    tests = [{"length": 512, "correct": {"1": correct, "8": 0}}, {"length": 1024, "correct": {"1": 0, "8": 0}}]
    dial = {**score, **tests[0], "attention": {"top_chunks": 4}, "density": 0.25}
    environment = {"gpu": "G", "torch": "1", "triton": "2", "commit": "c", "command": "run"}
    return {
        "part": "overwritten",
        "corpus": "overwritten",
        "method": method,
        "seed": seed,
        "size": "cpu",
        "texts": "digest",
        "jobs": 1,
        "environment": environment,
        "training": {"density": {}, "heldout": {}, "tokens_per_second": 1.0},
        "scores": [{**score, **test} for test in tests] + [dial],
    }


def test_tables_have_mean_and_spread_of_the_seeds() -> None:
    lines = as_markdown([record("dense", 0, 10), record("topk-6", 0, 4), record("topk-6", 1, 8)]).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| topk-6")]
    assert rows[0] == ["topk-6", "0.600 ± 0.283", "0.000 ± 0.000", "0.300 ± 0.141", "0.500 ± 0.000", "2"]
    assert rows[1] == ["topk-6", "0.300 ± 0.141", "0.000 ± 0.000", "2"]
    assert rows[2][1] == "0.60 ± 0.28 / 1.00 ± 0.00 / 0.50 ± 0.00"
    assert rows[4] == ["topk-6", "top_chunks 4", "0.300 ± 0.141", "0.250 ± 0.000", "1.0 ± 0.0", "2"]
    shared = as_markdown([record("dense", 0, 10), record("topk-6", 0, 4), {**record("topk-6", 1, 8), "jobs": 6}])
    assert "Methods without a time" in shared
    assert "Methods without a time" not in "\n".join(lines)
    assert "1.0 ± 0.0" not in shared
    assert re.search(r"\| dense +\| as trained +\| 0.500 +\| 0.500 +\| 1.0 ", shared)
    assert re.search(r"\| topk-6 +\| as trained +\| 0.300 ± 0.141 +\| 0.500 ± 0.000 +\| - ", shared)
    with pytest.raises(ValueError, match="results of the sizes cpu and gpu"):
        as_markdown([record("dense", 0, 1), {**record("dense", 1, 1), "size": "gpu"}])


def test_a_result_is_kept_and_one_of_other_settings_is_refused(tmp_path: Path) -> None:
    results, cell = Results(tmp_path), Cell("recall", "recall", "dense", 0)
    identity = {"size": "cpu", "settings": {"steps": 4}, "tests": [{"length": 512}]}
    assert not results.has(cell, identity)
    results.write(cell, {**identity, "part": "recall", "method": "dense", "seed": 0})
    assert results.has(cell, identity)
    assert not results.has(Cell("recall", "recall", "dense", 1), identity)
    with pytest.raises(OtherSettings, match=r"recall/dense.seed0.json is a result of another tests: move it away"):
        results.has(cell, {**identity, "tests": []})
    assert [one["method"] for one in results] == ["dense"]
