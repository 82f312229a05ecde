"""Mistakes and deaths: an error at every rank that can still speak, soon, and never a hang."""

import re

import pytest

from tests.support.ranks import run_ranks

ALIKE = "must call with equal shapes and settings: "
ERRORS = {
    "not a multiple": r"ranks 0-1: sequence length 96 is not a multiple of 2 x cp x chunk_size = 64: pad to 128$",
    "half a chunk": r"sequence length 16 is not a multiple of cp x chunk_size = 32: pad to 32$",
    "one chunk in zigzag": r"sequence length 32 is not a multiple of 2 x cp x chunk_size = 64: pad to 64$",
    "one chunk": "no error",
    "one rank's alpha": r"refused at rank 1: alpha is 3.0: give a number in \(1, 2\]",
    "different lengths": ALIKE + r"shape of q is, at rank 0: \(1, 32, 4, 16\); rank 1: \(1, 64, 4, 16\); shape of k",
    "different layouts": ALIKE + "layout is, at rank 0: contiguous; rank 1: zigzag$",
    "different exchanges": ALIKE + "exchange is, at rank 0: allgather; rank 1: ring$",
    "unknown layout": "layout is 'spiral': give one of zigzag, double_zigzag, contiguous$",
    "unknown exchange": "exchange is 'pigeon': give one of auto, selective, allgather, ring$",
    "ranks per node": "ranks_per_node is 3, which does not divide the context-parallel size 2: give one of 1, 2, or",
    "different ranks per node": ALIKE + "ranks_per_node is, at rank 0: 2; rank 1: None$",
    "incomplete document": "ends at token 53 with a chunk of 5 tokens.* pad every document to a multiple of .* = 16$",
    "incomplete document at one rank": "refused at rank 1: cu_seqlens has a document that ends at token 53",
    "different documents": ALIKE + "cu_seqlens is, at rank 0: of documents [0-9a-f]+; rank 1: of documents [0-9a-f]+$",
    "documents at one rank": ALIKE + "cu_seqlens is, at rank 0: not given; rank 1: of documents [0-9a-f]+$",
    "documents of a shard": "cu_seqlens ends at 64 but the sequence has 128 tokens",
    "documents in a batch": r"q of shape \(2, 64, 4, 16\): packed documents need batch 1",
    "good afterwards": "no error",
}


def test_a_mistake_at_one_rank_is_an_error_at_all() -> None:
    for messages in run_ranks("tests.context_parallel.failure_jobs:errors_at_every_rank", 2):
        assert messages.keys() == ERRORS.keys()
        for case, expected in ERRORS.items():
            assert re.search(expected, messages[case]), (case, messages[case])


def test_many_ranks_are_named_by_runs() -> None:
    from dash_dist.context_parallel.agreement import _by_ranks

    values = [(rank, "b" if rank in (3, 9) else "a") for rank in range(12)]
    assert _by_ranks(values) == "ranks 0-2, 4-8, 10-11: a; ranks 3, 9: b"


def test_one_micro_batch_more_at_one_rank_is_an_error_at_both() -> None:
    """The others wait for its backward pass. Gloo itself ends a process that is given an all-gather of another size
    than it began, which is what the two of "allgather" meet in.
    """
    timeout = 6.0
    found = run_ranks(
        "tests.context_parallel.failure_jobs:one_rank_has_one_more_micro_batch",
        6,
        timeout,
        time_limit=60,
        cpu_only=True,
        dying={2, 3},
    )
    said = {rank: what for rank, what in enumerate(found) if what is not None}
    assert said.keys() >= {0, 1, 4, 5}
    for rank, (message, seconds) in said.items():
        first = rank - rank % 2
        assert f"in the context-parallel group of ranks [{first}, {first + 1}]" in message
        assert seconds < timeout + 40
    assert said[0][0].startswith("rank 0: the comparison of the ranks' calls did not get through")


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_the_others_learn_of_a_rank_that_died_before_it_landed(moment: str) -> None:
    """Three groups of three ranks, each with another exchange. What had been sent may still arrive: then the others
    notice at their next exchange.
    """
    names = {
        0: ("K and V of the selected chunks", "gradients of the selected chunks' K and V"),
        3: ("K and V of all ranks", "gradients of K and V, summed at their owners"),
        6: ("K and V on their way round the ring", "gradients on their way round the ring"),
    }
    found = run_ranks(
        "tests.context_parallel.failure_jobs:a_rank_dies_before_it_lands",
        9,
        moment,
        60.0,
        time_limit=150,
        cpu_only=True,
        dying={2, 5, 8},
    )
    for rank, said in enumerate(found):
        first = rank - rank % 3
        if rank == first + 2:
            assert said is None
            continue
        message, seconds = said
        assert any(message.startswith(f"rank {rank}: {name} did not get through") for name in names[first]), message
        assert f"in the context-parallel group of ranks [{first}, {first + 1}, {first + 2}]" in message
        assert seconds < 60  # before the group's time is over
