"""Greedy continuations: those of a plain loop, with few passes where the guess is right."""

import numpy as np
import pytest

from dash_dist.data.tokenizer import ByteTokenizer
from dash_dist.errors import ConfigError
from dash_dist.evaluation.decoding import continue_greedily
from dash_dist.evaluation.gate import evaluate_retrieval
from dash_dist.evaluation.groups import Bench, accuracy_by_depth
from dash_dist.evaluation.suites import SUITES, TASKS
from tests.evaluation.evaluation_cases import Alone, FakePredictor, hashed, reading, solve

BYTES = ByteTokenizer()


def plain_greedy(next_token, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(np.array(tokens, dtype=np.int64)))
    return tokens[len(prompt) :]


def decode(next_token, prompts, guesses):
    predictor = FakePredictor(next_token)
    found = continue_greedily(predictor, prompts, guesses, sequence_length=80, padding=99)
    assert found.passes == len(predictor.calls)
    return [tokens.tolist() for tokens in found.tokens], predictor


@pytest.mark.parametrize("vocab_size", [2, 3, 50])  # with few tokens, guesses are often right by chance
@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_those_of_a_plain_loop_whatever_the_guess(vocab_size, seed):
    rng = np.random.default_rng(seed)
    next_token = hashed(vocab_size)
    prompts = [rng.integers(0, vocab_size, length) for length in (1, 7, 40, 60)]
    guesses = [rng.integers(0, vocab_size, length) for length in (20, 1, 13, 20)]
    given, predictor = decode(next_token, prompts, guesses)
    assert given == [plain_greedy(next_token, *pair) for pair in zip(prompts, map(len, guesses), strict=True)]
    assert len(predictor.calls) <= 20


def test_a_right_guess_takes_one_pass_and_a_late_mistake_two():
    next_token = hashed(50)
    prompt = np.arange(10)
    right = plain_greedy(next_token, prompt, 12)
    assert decode(next_token, [prompt], [right])[1].calls == [(1, 12)]
    late = [*right[:-1], (right[-1] + 1) % 50]
    given, predictor = decode(next_token, [prompt], [late])
    assert (given, len(predictor.calls)) == ([right], 1)  # the last token needs no other
    middle = [*right[:5], (right[5] + 1) % 50, *right[6:]]
    assert decode(next_token, [prompt], [middle])[0] == [right]


def test_rows_that_are_settled_are_left_out_of_later_passes():
    next_token = hashed(50)
    prompts = [np.arange(10), np.arange(5)]
    guesses = [plain_greedy(next_token, prompts[0], 6), np.zeros(4, dtype=np.int64)]
    _, predictor = decode(next_token, prompts, guesses)
    assert [rows for rows, _ in predictor.calls] == [2, *[1] * (len(predictor.calls) - 1)]
    assert len(predictor.calls) > 1


def bench(answer, **options):
    predictor = FakePredictor(reading(answer))
    return Bench(predictor, BYTES, Alone(), batch=2, **options), predictor


@pytest.mark.parametrize("task", TASKS)
def test_a_reader_has_accuracy_1_and_one_pass_a_batch(task):
    right, predictor = bench(solve)
    group = right.group(task, length=1500, sequence_length=1536, samples=3, routing_scale=2.0)
    assert group.accuracy == 1.0
    assert [one.index for one in group.samples] == [0, 1, 2]
    if task != "common_words":
        assert group.passes == 2
        assert predictor.routing_was_recorded == [True, True]
    assert group.density == 0.25
    assert set(accuracy_by_depth(group.samples).values()) <= {1.0}
    assert predictor.telemetry.record_routing is False


@pytest.mark.parametrize("task", ["single", "multi_value"])
def test_a_model_that_guesses_has_accuracy_0(task):
    guesser = Bench(FakePredictor(hashed(257)), BYTES, Alone(), batch=2)
    group = guesser.group(task, length=1000, sequence_length=1000, samples=4, routing_scale=None)
    assert group.accuracy == 0.0
    assert all(len(one.given) <= 64 for one in group.samples)


def test_a_model_that_finds_half_has_half():
    half, _ = bench(lambda text: ", ".join(solve(text).split(", ")[:2]) + ", nothing")
    group = half.group("multi_value", length=1000, sequence_length=1000, samples=2, routing_scale=None)
    assert group.accuracy == 0.5
    assert accuracy_by_depth(group.samples) == {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}


def test_the_gate_is_the_mean_over_the_retrieval_tasks():
    class Dims:
        dp_size = pp_size = 1

    def answer(text):
        return " nothing" if "order" in text.rsplit("\n")[-1] else solve(text)  # multi_query is not found

    engine = FakePredictor(reading(answer))
    engine.telemetry.record_routing = True  # as a run may have it
    gate = evaluate_retrieval(engine, BYTES, Dims(), Alone(), sequence_length=1000, samples=2)
    assert gate == pytest.approx(1 - 1 / len(SUITES["retrieval"]))
    assert engine.telemetry.record_routing is True


def test_a_sequence_that_is_too_short_is_refused():
    with pytest.raises((ConfigError, ValueError), match="100 tokens are too few for task single"):
        bench(solve)[0].group("single", length=100, sequence_length=100, samples=1, routing_scale=None)
