"""Samples: their exact lengths, and questions that their text answers."""

import itertools
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dash_dist.data.tokenizer import ByteTokenizer, load_tokenizer
from dash_dist.evaluation.question import evenly_spread, rotated
from dash_dist.evaluation.samples import make_sample
from dash_dist.evaluation.scores import found_parts
from dash_dist.evaluation.suites import SUITES, TASKS
from dash_dist.evaluation.words import ADJECTIVES, NOUNS, PLACES, VERBS, Filler, invented_words
from tests.data.tokenizers_of_tests import KINDS, save
from tests.evaluation.evaluation_cases import solve

BYTES = ByteTokenizer()
RETRIEVAL = SUITES["retrieval"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_tokenizer(with_decoder(save(kind, folder / f"{kind}.json"))) for kind in KINDS}


def with_decoder(path):
    """Write the decoder that published tokenizers of this kind have, and return the path."""
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.decoder is None:
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
        tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1500, 4096, 5001])
def test_the_question_is_answered_by_the_text_and_fills_the_length(task, length):
    for index in range(3):
        sample = make_sample(task, BYTES, length=length, index=index, seed=7)
        assert len(sample.prompt) + len(sample.answer) == length
        right = solve(BYTES.decode(sample.prompt))
        assert found_parts(sample.expected, right) == (True,) * len(sample.expected)
        if task != "common_words":  # whose words are equally frequent
            assert right == BYTES.decode(sample.answer)
        assert len(set(sample.expected)) == len(sample.expected)


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizer_fills_the_length_exactly(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for task, length in itertools.product(TASKS, (1200, 2501)):
        sample = make_sample(task, tokenizer, length=length, index=1, seed=0)
        assert len(sample.prompt) + len(sample.answer) == length
        assert sample.prompt.dtype == sample.answer.dtype == np.int64
        assert all(found_parts(sample.expected, tokenizer.decode(sample.answer)))
        text = tokenizer.decode(sample.prompt)
        assert all(part in text for part in sample.expected)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_task_length_index_and_seed_alone(task):
    def tokens(**changes):
        return make_sample(task, BYTES, **({"length": 2000, "index": 3, "seed": 5} | changes)).prompt.tolist()

    random.seed(1)
    first = tokens()
    random.seed(2)
    assert tokens() == first
    for changes in ({"index": 4}, {"seed": 6}, {"length": 2001}):
        assert tokens(**changes)[-1000:] != first[-1000:]


def test_facts_are_where_the_depth_says():
    for task, index in itertools.product(RETRIEVAL, range(8)):
        sample = make_sample(task, BYTES, length=20_000, index=index, seed=0)
        text = BYTES.decode(sample.prompt)
        start, end = text.index(" in this text.") + 14, text.rindex("\n")
        for number, depth in zip(sample.expected, sample.depths, strict=True):
            assert text.count(number) == 1
            assert (text.index(number) - start) / (end - start) == pytest.approx(depth, abs=0.02)


def test_depths_are_spread_evenly_for_any_number_of_samples():
    for count in (5, 8, 20, 33):
        depths = sorted(evenly_spread(index) for index in range(count))
        gaps = [after - before for before, after in itertools.pairwise([*depths, 1.0])]
        assert depths[0] == 0.0
        assert max(gaps) < 2.01 / count
    assert rotated(0.5, 4) == [0.0, 0.25, 0.5, 0.75]


def test_special_tokens_come_first_and_count():
    plain = make_sample("single", BYTES, length=1000, index=0, seed=0)
    started = make_sample("single", BYTES, length=1000, index=0, seed=0, start=(256, 256))
    assert started.prompt[:2].tolist() == [256, 256]
    assert len(started.prompt) == len(plain.prompt)
    assert started.expected == plain.expected


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_is_too_short_names_the_one_that_is_needed(task):
    with pytest.raises(ValueError, match=f"100 tokens are too few for task {task}: it needs about") as refused:
        make_sample(task, BYTES, length=100, index=0, seed=0)
    needed = int(str(refused.value).split("it needs about ")[1].split()[0])
    assert len(make_sample(task, BYTES, length=needed + 64, index=0, seed=0).answer) > 0


def test_a_tokenizer_that_cannot_write_the_answer_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match="task single needs one that keeps letters and digits"):
        make_sample("single", load_tokenizer(str(tmp_path / "words.json")), length=1000, index=0, seed=0)


def test_no_sentence_has_an_invented_word():
    invented = set(invented_words(random.Random(0), 70**3))
    assert len(invented) == 70**3
    assert invented.isdisjoint([*ADJECTIVES, *NOUNS, *VERBS, *PLACES])
    with pytest.raises(ValueError, match="343001 different words"):
        invented_words(random.Random(0), 70**3 + 1)
    filler = Filler(random.Random(0))
    assert list(filler.first(3)) == list(filler.first(9))[:3]


def test_scores_count_whole_words():
    assert found_parts(["123"], " 123. And so on") == (True,)
    assert found_parts(["123"], " 1234") == (False,)
    assert found_parts(["123"], "It is 123") == (False,)
    assert found_parts(["AB", "CD", "EF"], " CD, ABC; EF") == (False, True, True)
