"""`engine: deepspeed` trains to what `engine: megatron` trains to, at every ZeRO stage, and resumes exactly."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_dist.config.selection import NSAConfig
from tests.deepspeed_engine.deepspeed_cases import STEPS, Run, Trained
from tests.support.cases import asked, exhaustive
from tests.support.models import Case
from tests.support.ranks import run_ranks

# The fixture does everything. Its time, on idle cores a minute or two, says nothing on a busy machine.
TIME_LIMIT = 600.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * TIME_LIMIT)]

RECOMPUTE = Case(context=2, recompute="full")
TILE = 24
BAD_STEP = 3
REFERENCES = {
    "plain": Run(None, Case(micro_batch_size=4)),
    "packed": Run(None, Case(packed=True), bad_step=BAD_STEP),
    "tied": Run(None, Case(tie_embeddings=True), steps=4),
    "bf16": Run(None, steps=4, bfloat16=True),
    "fp8": Run(None, Case(micro_batch_size=4, fp8_linears=True), steps=2),
    "windows": Run(None, Case(kind=("dash", "window"), window=37), steps=4),
}
NSA = Case(kind=("dash", "nsa"), top_chunks=4, nsa=NSAConfig(window=24))
REFERENCES["nsa"] = Run(None, NSA, steps=4)
ALONE = {"plain, zero 1": Run(1)}
ON_TWO = {
    "plain, zero 1, cp 2": Run(1, Case(context=2)),
    "plain, zero 3, cp 2, recompute": Run(3, RECOMPUTE),
    "plain, zero 3, cp 2, selective": Run(3, Case(context=2, recompute="selective")),
    "plain, zero 3, dp 2, mlp": Run(3, Case(recompute="selective", recompute_modules=("mlp",))),
    "windows, zero 3, cp 2, selective": Run(
        3, Case(kind=("dash", "window"), window=37, context=2, recompute="selective"), steps=4
    ),
    "plain, zero 3, cp 2, offloaded": Run(3, dataclasses.replace(RECOMPUTE, offload_activations=1.0)),
    "plain, zero 2, dp 2, tiled, projections": Run(
        2, Case(recompute="selective", recompute_modules=("projections",), mlp_tile_tokens=TILE)
    ),
    "plain, zero 2, cp 2, tiled, recompute": Run(2, dataclasses.replace(RECOMPUTE, mlp_tile_tokens=TILE)),
    "packed, zero 1, dp 2": Run(1, Case(packed=True), bad_step=BAD_STEP),
    "packed, zero 3, cp 2": Run(3, Case(packed=True, context=2), bad_step=BAD_STEP),
    "tied, zero 3, dp 2": Run(3, Case(tie_embeddings=True), steps=4),
    "fp8, zero 3, cp 2, selective": Run(3, Case(context=2, recompute="selective", fp8_linears=True), steps=2),
    "fp8, zero 1, dp 2": Run(1, Case(fp8_linears=True), steps=2),
    "windows, zero 3, cp 2": Run(3, Case(kind=("dash", "window"), window=37, context=2), steps=4),
    "nsa, zero 2, cp 2, selective": Run(2, dataclasses.replace(NSA, context=2, recompute="selective"), steps=4),
    "bf16, zero 1, dp 2": Run(1, steps=4, bfloat16=True),
    "bf16, zero 2, cp 2, recompute": Run(2, RECOMPUTE, steps=4, bfloat16=True),
    "bf16, zero 3, cp 2": Run(3, Case(context=2), steps=4, bfloat16=True),
}
ON_FOUR = {
    "plain, zero 3, cp 2, dp 2": Run(3, Case(context=2)),
    "packed, zero 2, cp 2, dp 2, recompute": Run(2, Case(packed=True, context=2, recompute="full"), bad_step=BAD_STEP),
}
# What is left has each stage, each layout, each way to recompute, and each reference.
EXHAUSTIVE = {
    "plain, zero 3, cp 2, selective",
    "windows, zero 3, cp 2",
    "plain, zero 2, cp 2, tiled, recompute",
    "bf16, zero 1, dp 2",
    "bf16, zero 2, cp 2, recompute",
    "packed, zero 1, dp 2",
    "plain, zero 3, cp 2, dp 2",
}
NAMES = exhaustive([*ALONE, *ON_TWO, *ON_FOUR], EXHAUSTIVE)
SAVED = Run(2)
LOADED_BY_ONE = {"zero 1, alone": Run(1)}
LOADED_BY_FOUR = {"zero 2, dp 4": SAVED, "zero 3, cp 2, dp 2": Run(3, Case(context=2))}


@dataclass
class Seen:
    """Run -> what each rank saw; loads likewise; messages of one rank."""

    trained: dict[str, list[Trained]] = field(default_factory=dict)
    losses: dict[str, list[Any]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory) -> Seen:
    folder: Path = tmp_path_factory.mktemp("deepspeed")
    seen = Seen()
    names = asked(request, "name") | REFERENCES.keys() | {"packed, zero 3, cp 2"}

    def run(world_size: int, of_ranks: dict[str, Run], *then: tuple[str, Any]) -> None:
        runs = {name: run for name, run in of_ranks.items() if name in names}
        job, arguments = "tests.deepspeed_engine.deepspeed_jobs:one_after_another", (runs, then, folder)
        by_rank = run_ranks(job, world_size, *arguments, cpu_only=True, time_limit=TIME_LIMIT)
        for name in runs:
            seen.trained[name] = [trained[name] for trained, *_ in by_rank]
        for others in zip(*(others for _, *others in by_rank), strict=True):
            for name in others[0]:
                seen.losses[name] = [of_rank[name] for of_rank in others]

    run(2, ON_TWO, ("save_and_go_on", SAVED), ("odd_sizes", [2, 3, 1]))
    run(1, REFERENCES | ALONE, ("load_and_train", LOADED_BY_ONE))
    run(4, ON_FOUR, ("load_and_train", LOADED_BY_FOUR))
    (seen.messages,) = run_ranks(
        "tests.deepspeed_engine.deepspeed_jobs:refused_checkpoints", 1, folder, cpu_only=True, time_limit=TIME_LIMIT
    )
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_what_the_dashboards_ask_for_is_there(seen, name):
    run = (ALONE | ON_TWO | ON_FOUR)[name]
    parts = {"forward", "backward", "optimizer", "heat_map"} | ({"exchange"} if run.case.context > 1 else set())
    for rank in seen.trained[name]:
        assert rank.seconds.keys() == parts  # the reduction of gradients is within the backward pass
        assert all(seconds > 0 for part, seconds in rank.seconds.items() if part != "exchange")
        assert torch.equal(rank.chunks, seen.trained[name][0].chunks)


def test_selections_are_those_of_engine_megatron(seen):
    (expected,), found = seen.trained["packed"], seen.trained["packed, zero 3, cp 2"][0]
    assert (found.chunks - expected.chunks).abs().sum() <= 0.02 * expected.chunks.sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_run_is_that_of_engine_megatron(seen, name):
    run = (ALONE | ON_TWO | ON_FOUR)[name]
    (expected,) = seen.trained[name.split(",")[0]]
    # A last bit decides how a number is rounded to FP8, once weights differ by it.
    tolerance = 2e-2 if run.bfloat16 else 1e-3 if run.case.fp8_linears else 1e-5
    for rank in seen.trained[name]:
        assert rank.losses == pytest.approx(expected.losses, rel=tolerance)
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=10 * tolerance)
        assert rank.learning_rates == expected.learning_rates
        for key, weight in expected.weights.items():
            assert rank.weights[key].dtype == (torch.bfloat16 if run.bfloat16 else torch.float32)
            distance = (rank.weights[key].double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-3)
            assert distance < 30 * tolerance, key
        if run.case.context > 1:
            assert rank.sent_bytes > 0
    assert len(expected.losses) == run.steps - (run.bad_step is not None)
    assert min(expected.losses[1:]) < expected.losses[0]


@pytest.mark.parametrize(
    "name",
    exhaustive(
        [name for name, run in (REFERENCES | ON_TWO | ON_FOUR).items() if run.bad_step], {"packed, zero 1, dp 2"}
    ),
)
def test_a_step_whose_loss_is_not_finite_at_one_rank_changes_nothing_at_any(seen, name):
    for rank in seen.trained[name]:
        assert rank.skipped == [BAD_STEP]
        assert rank.unchanged is True
        assert len(rank.losses) == STEPS - 1


def test_a_run_goes_on_exactly_from_its_checkpoint(seen):
    (undisturbed, other), rolled_back = seen.losses["undisturbed"], seen.losses["rolled back"]
    assert undisturbed == other
    assert rolled_back == [undisturbed, undisturbed]


@pytest.mark.parametrize("name", [*LOADED_BY_ONE, *LOADED_BY_FOUR])
def test_another_number_of_ranks_and_another_stage_go_on_from_it(seen, name):
    for rank in seen.losses[name]:
        assert rank == pytest.approx(seen.losses["undisturbed"][0], rel=1e-5)


def test_slices_of_parameters_that_cannot_be_cut_evenly_are_kept_whole(seen):
    expected = seen.losses["zero 2"][0]
    assert [len(expected[f"exp_avg {name}"]) for name in ("0.weight", "0.bias", "1.weight", "1.bias")] == [15, 5, 5, 1]
    assert any(expected["exp_avg_sq 1.bias"])
    for stage in (2, 3, 1):
        assert seen.losses[f"zero {stage}"] == [expected, expected]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepspeed's to megatron", "ValueError: .*saved was written by engine: deepspeed .* has engine: megatron"),
        ("megatron's to deepspeed", "ValueError: .*of megatron was written by engine: megatron .* engine: deepspeed"),
        ("nothing", "FileNotFoundError: .*nowhere has no deepspeed.json"),
        ("truncated", r"^cannot read .*saved/rank_00001\.safetensors"),
        ("no header", r"^cannot read .*saved/rank_00001\.safetensors"),
        ("missing", r"^cannot read .*saved/rank_00001\.safetensors"),
        ("damaged index", r"deepspeed\.json is damaged: the slices of output_layer\.weight"),
        ("taken directory", "saved is not empty: save to a new directory"),
        ("other model", "ValueError: .*does not fit this run: .*tie_embeddings is False in the checkpoint and True"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused_in_words(seen, name, message):
    assert re.search(message, seen.messages[name]), seen.messages[name]
