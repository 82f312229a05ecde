"""A fixed number of chunks over ranks: every layout, exchange and kind of documents against the float64 reference."""

import pytest

from tests.support.cases import exhaustive
from tests.support.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("size", exhaustive([2, 4], [2]))
def test_every_exchange_equals_the_reference(size: int) -> None:
    for found in run_ranks("tests.context_parallel.selection_jobs:parity", size, cpu_only=True):
        assert len(found) >= 3 * 3 * 3 * 4
        for case, differences in found.items():
            assert max(differences.values()) < 1e-10, (case, differences)


def test_the_selective_exchange_of_two_ranks() -> None:
    arguments = ("zigzag",), "selective"
    for found in run_ranks("tests.context_parallel.selection_jobs:parity", 2, *arguments, cpu_only=True):
        for case, differences in found.items():
            assert max(differences.values()) < 1e-10, (case, differences)


def test_a_mistake_at_one_rank_is_an_error_at_all() -> None:
    for found in run_ranks("tests.context_parallel.selection_jobs:mistake", 2, cpu_only=True):
        assert "selection is, at rank 0: TopChunks(count=3); rank 1: TopChunks(count=4)" in found
