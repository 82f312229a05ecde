"""The same model and batch give the same step, and the same run, at every parallel layout."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.support.models import (
    CHUNK_SIZE,
    SEQUENCE_LENGTH,
    SEQUENCES,
    STEPS_AFTER_LOAD,
    STEPS_BEFORE_SAVE,
    Case,
    Measured,
    global_batch,
)
from tests.support.ranks import run_ranks

REFERENCE = Case(micro_batch_size=SEQUENCES)
TIED = dataclasses.replace(REFERENCE, tie_embeddings=True)
ALONE = {
    "reference": REFERENCE,
    "tied": TIED,
    "two micro-batches": Case(),
    "four micro-batches": Case(micro_batch_size=1),
    "recompute": Case(recompute="full"),
    "logits in pieces": Case(logits_per_piece=2 * 64 * 24),
    "packed": Case(packed=True),
    "packed, recompute": Case(packed=True, recompute="full"),
}
ON_TWO = {
    "cp 2": Case(context=2),
    "cp 2, contiguous, allgather": Case(context=2, layout="contiguous", exchange="allgather"),
    "cp 2, recompute": Case(context=2, recompute="full"),
    "tp 2": Case(tensor=2),
    "tp 2, logits in pieces": Case(tensor=2, logits_per_piece=2 * 32 * 24),
    "pp 2": Case(pipeline=2),
    "pp 2, tied": Case(pipeline=2, tie_embeddings=True),
    "dp 2": Case(),
    "packed, tp 2, recompute": Case(packed=True, tensor=2, recompute="full"),
    "packed, pp 2": Case(packed=True, pipeline=2),
    "packed, pp 2, recompute": Case(packed=True, pipeline=2, recompute="full"),
    "packed, dp 2": Case(packed=True),
    "packed, cp 2": Case(packed=True, context=2),
    "packed, cp 2, contiguous, recompute": Case(packed=True, context=2, layout="contiguous", recompute="full"),
}
ON_FOUR = {
    "tp 2, cp 2": Case(tensor=2, context=2),
    "cp 2, pp 2": Case(context=2, pipeline=2),
    "packed, tp 2, pp 2, recompute": Case(packed=True, tensor=2, pipeline=2, recompute="full"),
    "packed, tp 2, cp 2": Case(packed=True, tensor=2, context=2),
    "packed, cp 2, pp 2, recompute": Case(packed=True, context=2, pipeline=2, recompute="full"),
}
OVERLAP = Case(overlap_gradients=True, grad_clip=0.5, micro_batch_size=1)
OVERLAPPED_ON_FOUR = {
    "cp 2, dp 2": dataclasses.replace(OVERLAP, context=2),
    "tp 2, dp 2, sharded": dataclasses.replace(OVERLAP, tensor=2, distributed_optimizer=True),
    "pp 2, dp 2, recompute": dataclasses.replace(OVERLAP, pipeline=2, recompute="full"),
    "dp 4, projections, tiled": dataclasses.replace(
        OVERLAP, recompute="selective", recompute_modules=("projections",), mlp_tile_tokens=48
    ),
}
SAVED = Case(distributed_optimizer=True, grad_clip=0.5)
SAVED_ON_TWO = {
    "cp 2": dataclasses.replace(SAVED, context=2),
    "pp 2": dataclasses.replace(SAVED, pipeline=2),
    "dp 2": SAVED,
    "dp 2, overlap": dataclasses.replace(SAVED, overlap_gradients=True),
    "dp 2, plain optimizer": dataclasses.replace(SAVED, distributed_optimizer=False),
    "pp 2, tied": dataclasses.replace(SAVED, pipeline=2, tie_embeddings=True),
}


def measured_steps(cases_of_ranks: dict[int, dict[str, Case]]) -> dict[str, list[Measured]]:
    """Measure a step of each case on as many ranks as it is listed under; case name -> what each rank measured."""
    by_case: dict[str, list[Measured]] = {}
    for world_size, cases in cases_of_ranks.items():
        by_rank = run_ranks("tests.megatron.megatron_jobs:measure_steps", world_size, cases, cpu_only=True)
        by_case |= {name: [rank[name] for rank in by_rank] for name in cases}
    return by_case


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Measured]]:
    """Case name -> what each rank measured."""
    by_case = measured_steps({1: ALONE, 2: ON_TWO, 4: ON_FOUR})
    by_case["documents alone"] = run_ranks("tests.megatron.megatron_jobs:documents_alone", 1, Case(), cpu_only=True)
    return by_case


def joined(ranks: list[Measured], what: str) -> dict[str, torch.Tensor]:
    """Every weight of the model in full, after checking that ranks which hold the same part agree."""
    full: dict[str, torch.Tensor] = {}
    names = {name for rank in ranks for name in getattr(rank, what)}
    for name in names:
        parts: dict[int, torch.Tensor] = {}
        for rank in ranks:
            if name in getattr(rank, what):
                tensor, dim = getattr(rank, what)[name]
                first = parts.setdefault(rank.ranks["tp"], tensor)
                torch.testing.assert_close(tensor, first, rtol=0, atol=0)
        slices = [parts[index] for index in sorted(parts)]
        if dim is None:
            for tensor in slices:
                torch.testing.assert_close(tensor, slices[0], rtol=0, atol=0)
            full[name] = slices[0]
        elif name.endswith("linear_fc1.weight"):  # each slice: its rows of the gate above its rows of the up
            halves = [tensor.chunk(2) for tensor in slices]
            full[name] = torch.cat([half for pair in zip(*halves, strict=True) for half in pair])
        else:
            full[name] = torch.cat(slices, dim)
    return full


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Every tensor within `relative` of the expected one's norm."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name] - tensor).norm() / tensor.norm()
        assert error < relative, f"{name}: relative error {error:.1e}"


LAYOUTS = [*list(ALONE)[2:], *ON_TWO, *ON_FOUR]
PACKED = [name for name in LAYOUTS if "packed" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_give_the_step_that_they_give_alone(measured: dict[str, list[Measured]], name: str) -> None:
    (alone,) = measured["documents alone"]
    for rank in measured[name]:
        assert rank.losses == pytest.approx(alone.losses, rel=1e-6)
        assert rank.tokens == alone.tokens
        assert rank.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)
    assert_same(joined(measured[name], "gradients"), joined([alone], "gradients"), relative=1e-5)
    assert_same(joined(measured[name], "weights"), joined(measured["packed"], "weights"), relative=1e-5)


@pytest.mark.slow
def test_documents_make_a_difference(measured: dict[str, list[Measured]]) -> None:
    packed, whole = (joined(measured[name], "gradients") for name in ("packed", "four micro-batches"))
    name = next(name for name in whole if "summary_query" in name)
    assert (packed[name] - whole[name]).norm() > 0.1 * whole[name].norm()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_layers_are_given_the_same_tensor_of_their_micro_batch(recompute: Literal["none", "full"]) -> None:
    (calls,) = run_ranks(
        "tests.megatron.megatron_jobs:borders_seen_by_the_attention",
        1,
        Case(packed=True, recompute=recompute),
        cpu_only=True,
    )
    layers = 2 if recompute == "none" else 2 + 2  # forward, and again in the backward pass
    assert calls == [
        [batch == index for index in range(SEQUENCES)] for batch in range(SEQUENCES) for _ in range(layers)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in PACKED])
def test_step_equals_one_process(measured: dict[str, list[Measured]], name: str) -> None:
    reference = measured["tied" if "tied" in name else "reference"]
    ranks = measured[name]
    for rank in ranks:
        assert rank.losses == pytest.approx(reference[0].losses, rel=1e-6)
        assert rank.tokens == int(global_batch(0).loss_mask.sum())
        assert rank.grad_norm == pytest.approx(reference[0].grad_norm, rel=1e-5)
    assert_same(joined(ranks, "gradients"), joined(reference, "gradients"), relative=1e-5)
    assert_same(joined(ranks, "weights"), joined(reference, "weights"), relative=1e-5)


@pytest.mark.slow
def test_every_weight_has_a_gradient(measured: dict[str, list[Measured]]) -> None:
    gradients = joined(measured["reference"], "gradients")
    assert sum("summary_query" in name for name in gradients) == 2
    for name, gradient in gradients.items():
        assert gradient.norm() > 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_routing_statistics_cover_all_ranks(measured: dict[str, list[Measured]], name: str) -> None:
    # A rank's statistics are of its last micro-batch: what they hold in all depends on its size.
    reference = measured["reference"][0]
    for rank in measured[name]:
        assert len(rank.density) == 2
        assert all(0.1 < density < 1.0 for density in rank.density)
        dp_size = 1 + max(rank.ranks["dp"] for rank in measured[name])
        sequences = (ALONE | ON_TWO | ON_FOUR)[name].sequences_at_once * dp_size
        for selected in rank.selected:
            assert len(selected) == SEQUENCE_LENGTH // CHUNK_SIZE + 1
            assert sum(selected) == sequences * SEQUENCE_LENGTH * 2  # KV heads
            assert selected[0] == 0
    assert reference.density[0] == pytest.approx(
        sum(k * n for k, n in enumerate(reference.selected[0]))
        / (SEQUENCES * 2 * sum(1 + t // CHUNK_SIZE for t in range(SEQUENCE_LENGTH)))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_selection_maps_hold_what_the_layers_selected(measured: dict[str, list[Measured]], name: str) -> None:
    """Sums of the maps are those of the histograms, which come from the attention itself, at every rank."""
    chunks = SEQUENCE_LENGTH // CHUNK_SIZE
    for rank in measured[name]:
        assert len(rank.maps) == 2
        for (selected, available), histogram, density in zip(rank.maps, rank.selected, rank.density, strict=True):
            assert selected.shape == available.shape == (chunks, chunks)
            assert int(selected.sum()) == sum(number * count for number, count in enumerate(histogram))
            assert int(selected.sum()) / int(available.sum()) == pytest.approx(density)
            assert not available.triu(1).any()
            assert (selected <= available).all()
            assert torch.equal(selected.diagonal(), available.diagonal())  # the own chunk is always selected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp 2", "pp 2", "cp 2, contiguous, allgather", "cp 2, recompute", "cp 2, pp 2"])
def test_selection_maps_do_not_depend_on_the_layout(measured: dict[str, list[Measured]], name: str) -> None:
    alone = measured["two micro-batches"][0].maps  # the same last micro-batch
    for (selected, available), (selected_alone, available_alone) in zip(measured[name][0].maps, alone, strict=True):
        assert torch.equal(available, available_alone)
        assert (selected - selected_alone).abs().sum() <= 1e-3 * selected_alone.sum()  # sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_parts_of_a_step_lie_within_it(measured: dict[str, list[Measured]], name: str) -> None:
    case = (ALONE | ON_TWO | ON_FOUR)[name]
    parts = {"forward", "backward", "gradients", "optimizer", "heat_map"} | (
        {"exchange"} if case.context > 1 else set()
    )
    for rank in measured[name]:
        assert rank.seconds.keys() == parts
        assert all(seconds > 0 for part, seconds in rank.seconds.items() if part != "exchange")
        assert sum(rank.seconds.values()) < rank.step_seconds


@pytest.mark.slow
def test_overlapped_gradients_are_the_same() -> None:
    """Over several steps: Megatron-core learns in the first one which gradients come, and overlaps from the second."""
    job, steps = "tests.megatron.megatron_jobs:losses_of_steps", 4
    (alone,) = run_ranks(job, 1, {"alone": Case(grad_clip=0.5)}, steps, cpu_only=True)
    for losses in run_ranks(job, 4, OVERLAPPED_ON_FOUR, steps, cpu_only=True):
        for name in OVERLAPPED_ON_FOUR:
            assert losses[name] == pytest.approx(alone["alone"], rel=1e-5), name


@pytest.mark.parametrize(
    "case", [Case(context=2, micro_batch_size=4), Case(context=2, micro_batch_size=4, layout="contiguous")]
)
def test_first_token_reaches_the_last_rank(case: Case) -> None:
    moved = {
        ranks["cp"]: logits
        for ranks, logits in run_ranks("tests.megatron.megatron_jobs:logits_of_last_rank", 2, case, cpu_only=True)
    }
    assert moved[1].max() > 1e-3


@pytest.mark.slow
def test_checkpoints_continue_at_another_layout(tmp_path: Path) -> None:
    tied = dataclasses.replace(SAVED, tie_embeddings=True)
    cases = {"alone": SAVED, "alone, tied": tied}
    (alone,) = run_ranks("tests.megatron.megatron_jobs:train_and_save", 1, cases, tmp_path, cpu_only=True)
    expected = {name: alone["alone, tied" if "tied" in name else "alone"] for name in [*cases, *SAVED_ON_TWO]}
    for losses in expected.values():
        assert len(set(losses)) == STEPS_BEFORE_SAVE + STEPS_AFTER_LOAD
    for losses in run_ranks("tests.megatron.megatron_jobs:train_and_save", 2, SAVED_ON_TWO, tmp_path, cpu_only=True):
        for name in SAVED_ON_TWO:
            assert losses[name] == pytest.approx(expected[name], rel=1e-5), name

    plain = dataclasses.replace(SAVED, distributed_optimizer=False)
    loads_alone = [
        ("dp 2", SAVED),
        ("pp 2", SAVED),
        ("dp 2, plain optimizer", plain),
        ("alone", SAVED),
        ("pp 2, tied", tied),
        ("dp 2, overlap", SAVED),
    ]
    loads_on_two = [
        ("cp 2", dataclasses.replace(SAVED, tensor=2)),
        ("alone", dataclasses.replace(SAVED, pipeline=2)),
        ("pp 2", dataclasses.replace(SAVED, context=2)),
        ("dp 2, plain optimizer", dataclasses.replace(plain, tensor=2)),
        ("alone, tied", SAVED_ON_TWO["pp 2, tied"]),
        ("pp 2, tied", SAVED_ON_TWO["pp 2, tied"]),
    ]
    for world_size, loads in ((1, loads_alone), (2, loads_on_two)):
        for rank in run_ranks(
            "tests.megatron.megatron_jobs:load_and_train", world_size, loads, tmp_path, cpu_only=True
        ):
            for (name, _), (changes, step, losses) in zip(loads, rank, strict=True):
                assert changes == []
                assert step == STEPS_BEFORE_SAVE
                assert losses == pytest.approx(expected[name][STEPS_BEFORE_SAVE:], rel=1e-5), name


def test_errors_reach_every_rank_and_bad_steps_change_nothing(tmp_path: Path) -> None:
    zero, one = run_ranks("tests.megatron.megatron_jobs:errors_and_skips", 2, tmp_path, cpu_only=True)
    assert "tokens is [1, 120], expected [1, 128]" in one["short at rank 1"]
    assert "ranks [1] were given malformed micro-batches" in zero["short at rank 1"]
    for name, message in {
        "late": "cu_seqlens goes from 16 to 128: its entries must go from 0 to the sequence length, 128",
        "early": "cu_seqlens goes from 0 to 112",
        "falling": "cu_seqlens decreases",
        "partial": "cu_seqlens has the border 40: pad documents to whole chunks, 16 tokens each",
        "int64": "cu_seqlens is torch.int64 [2]: give torch.int32 [documents + 1]",
        "one entry": "cu_seqlens is torch.int32 [1]",
        "borders for four sequences at rank 1": "cu_seqlens is given for 4 sequences",
    }.items():
        assert message in one[name]
        assert "ranks [1] were given malformed micro-batches" in zero[name]
    for seen in (zero, one):
        assert "{0: '4 of 1 sequences', 1: '3 of 1 sequences'}" in seen["one less at rank 1"]
        assert "ranks [0, 1] share data-parallel index 0" in seen["other data at rank 1"]
        assert "loss_mask is 0 for every token" in seen["no loss token"]
        assert "the vocabulary has 50 tokens" in seen["foreign tokens"]
        for name in ("other borders at rank 1", "no borders at rank 1"):
            assert "ranks [0, 1] share data-parallel index 0 and were given different sequences" in seen[name]
        assert "set record_routing = True" in seen["no routing"]
        assert "set record_seconds = True" in seen["no seconds"]
        assert "layers [1] were not recorded: set record_selections" in seen["no selections"]
        assert "is not a checkpoint" in seen["no checkpoint"]
        assert "taken is not empty" in seen["taken directory"]
        assert "close() the earlier ParallelDims" in seen["second dims"]
        assert "tie_embeddings is False in the checkpoint and True in this run" in seen["other model"]
        assert "distributed_optimizer is True in the checkpoint" in seen["other model"]
        assert "world size 2 is not a multiple of tensor x pipeline x context" in seen["world size"]
        assert seen["step after errors"] == 0
        assert seen["skipped"]
        assert seen["unchanged"]
        assert not seen["next"]


def test_norms_and_summary_queries_are_not_decayed() -> None:
    (names,) = run_ranks("tests.megatron.megatron_jobs:undecayed_weights", 1, cpu_only=True)
    assert names == {
        "decoder.final_layernorm.weight",
        *(
            f"decoder.layers.{layer}.{name}"
            for layer in (0, 1)
            for name in (
                "input_layernorm.weight",
                "pre_mlp_layernorm.weight",
                "self_attention.core_attention.attention.summary_query",
            )
        ),
    }
