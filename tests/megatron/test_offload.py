"""Layers' inputs on the host change nothing of a step, use the same blocks in every step, and leave none in use."""

import dataclasses
import re

import pytest
import torch
from pydantic import ValidationError

from dash_dist.config.parallel import ParallelConfig, offloaded_layers
from dash_dist.megatron import host_memory
from tests.support.cases import exhaustive
from tests.support.models import Case
from tests.support.ranks import run_ranks

FULL = Case(recompute="full")
ALONE = {
    "alone": dataclasses.replace(FULL, micro_batch_size=1),
    "alone, batch": FULL,
    "alone, selective": dataclasses.replace(FULL, recompute="selective"),
    "alone, three layers": dataclasses.replace(FULL, recompute_layers=3),
    "alone, tiled": dataclasses.replace(FULL, mlp_tile_tokens=24),
}
ON_TWO = {
    "cp 2": dataclasses.replace(FULL, context=2),
    "tp 2, tiled": dataclasses.replace(FULL, tensor=2, mlp_tile_tokens=24),
    "pp 2": dataclasses.replace(FULL, pipeline=2),
    "cp 2, selective, tiled": dataclasses.replace(FULL, recompute="selective", context=2, mlp_tile_tokens=24),
    "cp 2, selective, three layers": dataclasses.replace(FULL, recompute="selective", context=2, recompute_layers=3),
    "packed, cp 2": dataclasses.replace(FULL, context=2, packed=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", exhaustive([1, 2], [1]))
def test_steps_are_bit_for_bit_those_without_offload(ranks: int) -> None:
    cases, fractions = (ALONE, (0.5, 1.0)) if ranks == 1 else (ON_TWO, (1.0,))
    offloaded = {
        f"{name}, {fraction}": dataclasses.replace(case, offload_activations=fraction)
        for name, case in cases.items()
        for fraction in (0.0, *fractions)
    }
    for by_name in run_ranks("tests.megatron.offload_jobs:two_steps", ranks, offloaded, cpu_only=True):
        for name in cases:
            plain = by_name[f"{name}, 0.0"]
            for fraction in fractions:
                found = by_name[f"{name}, {fraction}"]
                assert found["results"] == plain["results"]
                for key, gradient in plain["gradients"].items():
                    assert torch.equal(found["gradients"][key], gradient), (name, key)
                for allocated, free in found["blocks"]:
                    assert (allocated, free) == found["blocks"][0]
                    assert allocated == free > 0


def test_the_last_layers_stay_and_the_others_come_back_one_by_one() -> None:
    ((forward, backward),) = run_ranks(
        "tests.megatron.offload_jobs:inputs_on_the_host",
        1,
        dataclasses.replace(FULL, micro_batch_size=4, offload_activations=0.5),
        cpu_only=True,
    )
    assert forward == [0, 1, 2, 2]
    assert backward == [2, 2, 2, 1]


def test_of_some_layers_the_last_that_is_recomputed_stays() -> None:
    case = dataclasses.replace(FULL, micro_batch_size=4, recompute_layers=3, offload_activations=1.0)
    ((forward, backward),) = run_ranks("tests.megatron.offload_jobs:inputs_on_the_host", 1, case, cpu_only=True)
    assert forward == [0, 1, 2, 2]
    assert backward == [2, 2, 1]  # the fourth layer is not run again


def test_failed_steps_and_evaluations_leave_no_block_in_use() -> None:
    (seen,) = run_ranks(
        "tests.megatron.offload_jobs:failures", 1, dataclasses.replace(FULL, offload_activations=1.0), cpu_only=True
    )
    assert seen["evaluation"] == (0, 0)
    for where in ("forward", "backward"):
        assert seen[f"message {where}"] == "failed on purpose"
        allocated, free = seen[where]
        assert allocated == free > 0
    assert seen["after"][0] == seen["after"][1] == 3
    assert seen["grad norm"] > 0
    assert re.search(
        r"offload_activations needs 0\.1 GiB of host memory more .* 2\.0 GiB are available, .* lower parallel\.offload",
        seen["too little"],
    )


def test_memory_of_a_container_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    machine = host_memory.available_host_bytes()
    assert machine > 0
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available_host_bytes() > 2**20
    (tmp_path / "memory.max").write_text("4096\n")
    assert host_memory.available_host_bytes() == 4096 - 3000 + 500


def test_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"0\.5 moves the inputs of layers that are recomputed as a whole"):
        ParallelConfig(offload_activations=0.5)


def test_last_layers_and_inputs_of_later_stages_stay() -> None:
    assert list(offloaded_layers(1.0, 4, first_stage=True)) == [0, 1, 2]
    assert list(offloaded_layers(1.0, 4, first_stage=False)) == [1, 2]
    assert list(offloaded_layers(0.5, 6, first_stage=False)) == [1, 2, 3]
    assert not offloaded_layers(1.0, 1, first_stage=False)
    assert not offloaded_layers(0.0, 4, first_stage=True)
