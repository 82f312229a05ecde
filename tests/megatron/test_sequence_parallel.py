"""A step with the residual stream in shards over tensor parallelism is the step of one process, at odd sizes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.sequence_parallel_cases import Run
from tests.megatron.test_layouts import joined
from tests.support.cases import asked, exhaustive
from tests.support.models import STEPS_AFTER_LOAD, STEPS_BEFORE_SAVE, Case, Measured
from tests.support.ranks import run_ranks

JOBS = "tests.megatron.sequence_parallel_jobs"
SEED = 71
ODD = 118  # 59 tokens a tensor-parallel rank
TWICE = 192  # over two context-parallel ranks; 48 tokens a tensor-parallel rank
TP = Case(tensor=2)
PIECES = 2 * 2 * 32 * 17  # logits of 17 tokens of each of two shards and two sequences


def changed(**settings: Any) -> Case:
    return dataclasses.replace(TP, **settings)


ON_TWO = {
    "plain": Run(TP, ODD),
    "whole sequences": Run(changed(sequence_parallel=False), ODD),
    "batch of three, tied, in pieces": Run(
        changed(micro_batch_size=3, tie_embeddings=True, logits_per_piece=PIECES), ODD
    ),
    "batch of two, in pieces": Run(changed(logits_per_piece=PIECES), ODD),
    "norms of queries and keys, biases": Run(changed(family="qwen3"), ODD, (("attention_bias", True),)),
    "norms after, norms over all heads": Run(changed(family="olmo2"), ODD),
    "norms after, recompute, tiled": Run(changed(family="olmo2", recompute="full", mlp_tile_tokens=23), ODD),
    "selective": Run(changed(recompute="selective"), ODD),
    "projections": Run(changed(recompute="selective", recompute_modules=("projections",)), ODD),
    "mlp": Run(changed(recompute="selective", recompute_modules=("mlp",)), ODD),
    "recompute, offload, tiled": Run(changed(recompute="full", offload_activations=1.0, mlp_tile_tokens=30), ODD),
    "window and dense, without positions": Run(
        changed(kind=("window", "dense"), window=20), ODD, (("layers_without_positions", (1,)),)
    ),
    "topk and dash": Run(changed(kind=("topk", "dash"), top_chunks=3), TWICE),
    "infllmv2": Run(changed(kind="infllmv2", top_chunks=34), TWICE),
    "packed": Run(changed(packed=True), TWICE),
    "packed, selective, tiled": Run(changed(packed=True, recompute="selective", mlp_tile_tokens=50), TWICE),
    "lora": Run(changed(micro_batch_size=2), ODD, (), (("lora", {"rank": 3}),)),
    "lora of some, recompute": Run(
        changed(recompute="full", mlp_tile_tokens=30),
        ODD,
        (),
        (("lora", {"rank": 3, "linears": ("v_proj", "o_proj", "up_proj")}),),
    ),
    "frozen": Run(
        changed(recompute="selective"),
        ODD,
        (),
        (("parameters", [{"match": "*layernorm.weight"}, {"match": "*.mlp.linear_fc2.weight"}]),),
    ),
}
ON_FOUR = {
    "cp": Run(changed(context=2), TWICE),
    "cp, contiguous, whole sequences": Run(changed(context=2, layout="contiguous", sequence_parallel=False), TWICE),
    "cp, packed, tied, recompute": Run(
        changed(context=2, packed=True, tie_embeddings=True, recompute="full", logits_per_piece=PIECES), TWICE
    ),
    "cp, norms over all heads, windows": Run(
        changed(context=2, family="olmo2", kind=("window", "dash"), window=20, recompute="selective"), TWICE
    ),
    "cp, topk, lora": Run(changed(context=2, kind="topk", top_chunks=3), TWICE, (), (("lora", {"rank": 3}),)),
    "pp": Run(changed(pipeline=2), ODD),
    "pp, tied, recompute, offload, tiled": Run(
        changed(pipeline=2, tie_embeddings=True, recompute="full", offload_activations=1.0, mlp_tile_tokens=30), ODD
    ),
    "pp, packed, norms of queries and keys": Run(changed(pipeline=2, packed=True, family="qwen3"), TWICE),
    "dp, sharded, overlapped": Run(
        changed(distributed_optimizer=True, overlap_gradients=True, micro_batch_size=3, grad_clip=0.5), ODD
    ),
}
# One of each kind stays: a layout, a family, a way to recompute, a kind of attention, packed, adapters, a pipeline.
EXHAUSTIVE = {
    "whole sequences",
    "batch of two, in pieces",
    "norms after, norms over all heads",
    "selective",
    "projections",
    "recompute, offload, tiled",
    "infllmv2",
    "packed",
    "lora",
    "cp, contiguous, whole sequences",
    "cp, norms over all heads, windows",
    "pp",
}


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[str, tuple[list[Measured], Measured]]:
    """Name -> of each rank, and of one process."""
    names = asked(request, "name")
    runs = {name: run for name, run in (ON_TWO | ON_FOUR).items() if name in names}
    (alone,) = run_ranks(f"{JOBS}:measure", 1, {name: run.alone() for name, run in runs.items()}, SEED, cpu_only=True)
    found = {}
    for ranks, of_ranks in ((2, ON_TWO), (4, ON_FOUR)):
        cases = {name: runs[name] for name in of_ranks if name in runs}
        by_rank = run_ranks(f"{JOBS}:measure", ranks, cases, SEED, cpu_only=True)
        found |= {name: ([of_rank[name] for of_rank in by_rank], alone[name]) for name in cases}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", exhaustive([*ON_TWO, *ON_FOUR], EXHAUSTIVE))
def test_step_is_that_of_one_process(measured: dict[str, tuple[list[Measured], Measured]], name: str) -> None:
    ranks, alone = measured[name]
    for rank in ranks:
        assert rank.losses == pytest.approx(alone.losses, rel=1e-6)
        assert rank.grad_norm == pytest.approx(alone.grad_norm, rel=3e-6)
    if not (ON_TWO | ON_FOUR)[name].case.distributed_optimizer:  # which leaves each rank a part of the sums
        assert_same(joined(ranks, "gradients"), joined([alone], "gradients"), relative=1e-5)
    # AdamW's first update has the size of the learning rate, however small the gradient that decides on its sign: an
    # element whose gradient is rounding may differ. A wrong gradient moves whole weights, by 1e-2 and more.
    assert_same(joined(ranks, "weights"), joined([alone], "weights"), relative=1e-3)


def test_layers_norm_a_shard() -> None:
    for sequence_parallel, tokens in ((None, ODD // 2), (False, ODD)):
        case = changed(sequence_parallel=sequence_parallel, micro_batch_size=3)
        for shapes in run_ranks(f"{JOBS}:tokens_of_norms", 2, case, ODD, cpu_only=True):
            assert set(shapes) == {(tokens, 3, 44)}


def test_pieces_are_gathered_with_their_labels() -> None:
    for rows in (1, 3, 7):
        for tokens, labels in run_ranks(f"{JOBS}:order_of_pieces", 3, rows, cpu_only=True):
            assert torch.equal(tokens, torch.stack([torch.arange(21), torch.arange(21) + 100]))
            assert torch.equal(labels, tokens)


def test_marked_rows_are_divided_evenly() -> None:
    for found in run_ranks(f"{JOBS}:marked_rows", 2, [0, 1, 2, 15, 30], cpu_only=True):
        for rows, expected in found:
            assert len(rows) == max(2, len(expected) + len(expected) % 2)
            assert torch.equal(rows[: len(expected)], expected)
            assert not rows[len(expected) :].any()


@pytest.mark.slow
def test_evaluation_and_next_tokens_are_those_of_one_process() -> None:
    job = f"{JOBS}:evaluations"
    ((expected, tokens),) = run_ranks(job, 1, {"alone": Case()}, TWICE, cpu_only=True)[0].values()
    cases = {"tp": changed(logits_per_piece=PIECES), "tp, whole sequences": changed(sequence_parallel=False)}
    for ranks, layouts in ((2, cases), (4, {"cp": changed(context=2), "pp": changed(pipeline=2)})):
        for found in run_ranks(job, ranks, layouts, TWICE, cpu_only=True):
            for name, (losses, next_tokens) in found.items():
                assert [one.tokens for one in losses] == [one.tokens for one in expected], name
                assert [one.total for one in losses] == pytest.approx([one.total for one in expected], rel=1e-6), name
                assert torch.equal(next_tokens, tokens), name


@pytest.mark.slow
def test_checkpoints_continue_with_and_without(tmp_path: Path) -> None:
    case = changed(distributed_optimizer=True, family="qwen3")
    whole = dataclasses.replace(case, sequence_parallel=False)
    saved = run_ranks(
        "tests.megatron.megatron_jobs:train_and_save", 2, {"shards": case, "whole": whole}, tmp_path, cpu_only=True
    )
    losses = saved[0]["shards"]
    assert len(set(losses)) == STEPS_BEFORE_SAVE + STEPS_AFTER_LOAD
    assert saved[0]["whole"] == pytest.approx(losses, rel=1e-5)
    loads = [("shards", whole), ("whole", case)]
    alone = [("shards", dataclasses.replace(case, tensor=1))]
    for ranks, chosen in ((2, loads), (1, alone)):
        for found in run_ranks("tests.megatron.megatron_jobs:load_and_train", ranks, chosen, tmp_path, cpu_only=True):
            for changes, step, after in found:
                assert (changes, step) == ([], STEPS_BEFORE_SAVE)
                assert after == pytest.approx(losses[STEPS_BEFORE_SAVE:], rel=1e-5)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Every tensor within `relative` of the expected one's norm, and 0 where that is: lists have no gradient."""
    assert actual.keys() == expected.keys()
    errors = {
        name: float((actual[name] - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
        if tensor.any() or actual[name].any()
    }
    assert {name: error for name, error in errors.items() if error > relative} == {}
