"""Native Sparse Attention over ranks: every layout, exchange and kind of documents against the float64 reference."""

import pytest

from tests.support.cases import exhaustive
from tests.support.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("size", exhaustive([2, 4], [2]))
def test_every_exchange_equals_the_reference(size: int) -> None:
    for found in run_ranks("tests.context_parallel.nsa_jobs:parity", size, cpu_only=True):
        assert len(found) >= 3 * 3 * 4
        for case, differences in found.items():
            assert max(differences.values()) < 1e-10, (case, differences)


@pytest.mark.parametrize("chunk_size", [16, 32])
def test_the_selective_exchange_of_two_ranks(chunk_size: int) -> None:
    """The halo of compressed blocks is a chunk, and half a chunk."""
    arguments = ("zigzag",), "selective", chunk_size
    for found in run_ranks("tests.context_parallel.nsa_jobs:parity", 2, *arguments, cpu_only=True):
        for case, differences in found.items():
            assert max(differences.values()) < 1e-10, (case, differences)


@pytest.mark.slow
def test_recomputed_layers() -> None:
    for found in run_ranks("tests.context_parallel.nsa_jobs:recomputed", 2, cpu_only=True):
        for way, differences in found.items():
            assert max(differences.values()) < 1e-12, (way, differences)


def test_heat_maps_count_what_the_layer_selected() -> None:
    for counted, selected in run_ranks("tests.context_parallel.nsa_jobs:counted_selections", 2, cpu_only=True):
        assert counted == selected


def test_a_mistake_at_one_rank_is_an_error_at_all() -> None:
    for found in run_ranks("tests.context_parallel.nsa_jobs:mistake", 2, cpu_only=True):
        assert "window is, at rank 0: 35; rank 1: 36" in found
