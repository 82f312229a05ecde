"""Layers under activation checkpointing: right, and no more sent than without it."""

import pytest

from tests.support.ranks import run_ranks


def test_a_recomputed_layer_plans_once_and_fetches_twice() -> None:
    for found in run_ranks("tests.context_parallel.recompute_jobs:recomputed_layers", 4, cpu_only=True):
        assert len(found) == 5
        for case, run in found.items():
            assert run["reentrant is right"], case
            assert run["kept output is right"], case
            assert run["non-reentrant is right"], case
            assert run["memory is empty"], case
            plain, reentrant, kept, without_memory = run["calls"]
            plain_bytes, reentrant_bytes, kept_bytes, bytes_without_memory = run["bytes"]
            assert (kept, kept_bytes) == (plain, plain_bytes)  # the recomputation fetches nothing
            if "ring" in case:  # goes round in the recomputation as well
                assert reentrant_bytes == bytes_without_memory > plain_bytes
                continue
            assert reentrant == plain
            assert reentrant_bytes == plain_bytes < bytes_without_memory
            if "selective" in case:
                # Two micro-batches through a layer twice. A plan is an all-to-all per hop; K and V travel twice, their
                # gradients once.
                hops = 2 if "selective, 2" in case else 1
                assert reentrant == {"plan": 4 * hops, "tensors": 4 * 3 * hops}
                assert without_memory == {"plan": 8 * hops, "tensors": 4 * 4 * hops}


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_passes_find_what_is_theirs_in_any_order(recompute: str) -> None:
    for found in run_ranks("tests.context_parallel.recompute_jobs:recomputed_in_other_orders", 2, recompute):
        assert all(found.values()), found


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_second_backward_pass_is_not_given_another_micro_batchs_plan(recompute: str) -> None:
    for found in run_ranks("tests.context_parallel.recompute_jobs:recomputed_again", 2, recompute):
        assert all(found.values()), found


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_evaluation_leaves_nothing_behind(recompute: str) -> None:
    job = "tests.context_parallel.recompute_jobs:evaluation_leaves_nothing_behind"
    assert all(run_ranks(job, 2, recompute))
