"""Advice where a batch is parts of few documents."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dash_dist.config.data import DataConfig
from dash_dist.data.advice import advise
from tests.data.data_streams import source_of


def advice(*lengths: list[int], batch: int = 8, **options: Any) -> str | None:
    """Advice for sources with documents of some lengths, read in batches of sequences of 100 tokens."""
    sources = [{"paths": [f"{number}.txt"], "label": f"{number}", "weight": 1.0} for number in range(len(lengths))]
    corpus: Any = SimpleNamespace(sources={f"{number}": source_of(one) for number, one in enumerate(lengths)})
    return advise(DataConfig(sources=sources, **options), corpus, sequence_length=100, global_batch_size=batch)


def test_long_documents_are_to_be_cut() -> None:
    told = advice([1000] * 50)
    assert told is not None
    assert "a global batch of 800 tokens is parts of about 1 documents" in told
    assert "set data.cut_documents to 100" in told


def test_documents_are_weighed_by_their_tokens() -> None:
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(2, 20, 500), [40_000]])
    assert advice(lengths.tolist()) is not None  # nearly all tokens are of the last one
    assert advice(lengths[:-1].tolist()) is None
    assert advice(lengths.tolist(), [10] * 20) is not None
    assert advice([390] * 10, [10] * 20) is None  # half of the tokens each: 200 on average


@pytest.mark.parametrize(
    "options",
    [
        {"cut_documents": 100},
        {"shuffle_seed": None},
        {"documents": "separate", "long_documents": "drop"},
        {"batch": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_is_said_where_it_would_not_help(options: dict[str, Any]) -> None:
    assert advice([1000] * 50, **options) is None


def test_parts_that_are_long_are_to_be_shorter() -> None:
    assert advice([1000] * 50, cut_documents=500) is not None
    assert [advice([1000] * 50, cut_documents=cut) is None for cut in (100, 200, 201)] == [True, True, False]


def test_the_average_is_of_any_order() -> None:
    found = {advice(list(lengths)) for lengths in itertools.permutations([5, 900, 300])}
    assert len(found) == 1
