"""Linears in FP8: outputs and gradients against float64, on tensor-parallel ranks too, and the steps made of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_kernels.fp8 import ScaledRows, cast_rows
from tests.megatron.test_layouts import assert_same, joined
from tests.support.models import Case, Measured
from tests.support.ranks import run_ranks

JOBS = "tests.megatron.fp8_jobs"
FP8 = Case(fp8_linears=True)
LINEARS = {"qkv": (32, 64), "proj": (32, 32), "fc1": (32, 128), "fc2": (64, 32)}  # inputs and outputs
COLUMNS = ("qkv", "fc1")
FROZEN = {"parameters": [{"match": "*.mlp.linear_fc1.weight"}, {"match": "*layernorm.weight"}]}


def numbers(x: torch.Tensor) -> torch.Tensor:
    return cast_rows(x).numbers(torch.float64)


def rounding(x: torch.Tensor) -> torch.Tensor:
    """The largest distance of a number from that which stands for it."""
    cast: ScaledRows = cast_rows(x)
    return torch.maximum(2.0**-4 * x.abs().double(), 2.0**-10 * cast.scales.double())


def given(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of `fp8_jobs.given`, [s x b, in] and [s x b, out]."""
    inputs, outputs = LINEARS[name]
    generator = torch.Generator().manual_seed(len(name) + inputs)
    sizes = 10.0 ** torch.linspace(-4, 2, 22)[:, None, None]
    x, gradient = (torch.randn(22, 3, width, generator=generator) * sizes for width in (inputs, outputs))
    return x.flatten(0, 1), gradient.flatten(0, 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "case", [FP8, dataclasses.replace(FP8, tensor=2), dataclasses.replace(FP8, tensor=2, sequence_parallel=False)]
)
def test_outputs_and_gradients_are_those_of_the_numbers(case: Case, frozen: bool) -> None:
    ranks = run_ranks(f"{JOBS}:linears", case.tensor, case, frozen, cpu_only=True)
    shards = case.tensor > 1 and case.sequence_parallel is not False
    for name in LINEARS:
        x, gradient = given(name)
        found = [rank[name] for rank in ranks]
        weights = [one["weight"] for one in found]
        xs = [x] * len(ranks) if name in COLUMNS else x.chunk(len(ranks), -1)
        gradients = gradient.chunk(len(ranks), -1) if name in COLUMNS else [gradient] * len(ranks)
        outputs = [numbers(one) @ numbers(weight).t() for one, weight in zip(xs, weights, strict=True)]
        of_xs = [numbers(one) @ numbers(weight.t()).t() for one, weight in zip(gradients, weights, strict=True)]
        if name in COLUMNS:
            of_xs = [sum(of_xs)] * len(ranks)
            outputs = [one + of.get("bias", torch.zeros(1)) for one, of in zip(outputs, found, strict=True)]
        else:
            outputs = [sum(outputs)] * len(ranks)
        for index, one in enumerate(found):
            own = {"gradient of x": of_xs[index], "output": outputs[index]}
            for key, whole in own.items():
                is_shard = shards and (key == "output") == (name not in COLUMNS)
                wanted = whole.chunk(len(ranks))[index] if is_shard else whole
                assert_rows_close(one[key].flatten(0, 1), wanted)
            assert ("gradient of weight" in one) != frozen
            if not frozen:  # in full precision
                wanted = gradients[index].double().t() @ xs[index].double()
                torch.testing.assert_close(one["gradient of weight"].double(), wanted, rtol=1e-5, atol=1e-3)
            if "bias" in one:
                wanted = gradients[index].double().sum(0)
                torch.testing.assert_close(one["gradient of bias"].double(), wanted, rtol=1e-4, atol=0.0)


def assert_rows_close(found: torch.Tensor, wanted: Any) -> None:
    """Every token within a millionth of its own size."""
    assert ((found.double() - wanted).norm(dim=1) <= 2e-6 * wanted.norm(dim=1)).all()


def test_products_are_within_the_rounding_of_the_plain_ones() -> None:
    (found,) = run_ranks(f"{JOBS}:linears", 1, FP8, False, cpu_only=True)
    for name, one in found.items():
        x, gradient = given(name)
        for rows, weight, result in (
            (x, one["weight"], one["output"].flatten(0, 1) - one.get("bias", torch.zeros(1))),
            (gradient, one["weight"].t(), one["gradient of x"].flatten(0, 1)),
        ):
            exact = rows.double() @ weight.double().t()
            off, of_weight = rounding(rows), rounding(weight)
            bound = off @ weight.abs().double().t() + (rows.abs().double() + off) @ of_weight.t()
            error = (result.double() - exact).abs()
            assert (error <= bound * (1 + 1e-4) + 1e-6 * one["output"].abs().max()).all(), name
            assert error.norm() < 0.06 * exact.norm(), name  # and far less than the bound
            assert error.norm() > 0.005 * exact.norm(), name


def test_the_linears_of_the_decoder_are_in_fp8_and_no_other_matrix() -> None:
    llama, plain, olmo = (
        run_ranks(f"{JOBS}:classes", 1, case, cpu_only=True)[0]
        for case in (FP8, Case(), dataclasses.replace(FP8, family="olmo2"))
    )
    columns = dict.fromkeys(("linear_qkv", "linear_fc1"), "Fp8ColumnLinear")
    others = {"word_embeddings": "VocabParallelEmbedding", "output_layer": "ColumnParallelLinear"}
    assert llama == {**columns, **dict.fromkeys(("linear_proj", "linear_fc2"), "LastFp8Linear"), **others}
    assert olmo == {**columns, **dict.fromkeys(("linear_proj", "linear_fc2"), "Fp8RowLinear"), **others}
    assert not any("Fp8" in name for name in plain.values())


WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective", "recompute_layers": 1},
    "mlp": {"recompute": "selective", "recompute_modules": ("mlp",)},
}


def step_of(ranks: int, **cases: Case) -> dict[str, list[Measured]]:
    by_rank = run_ranks(f"{JOBS}:measure", ranks, cases, cpu_only=True)
    return {name: [rank[name] for rank in by_rank] for name in cases}


@pytest.mark.slow
def test_a_step_is_the_same_at_every_layout() -> None:
    """But for tensor parallelism, by which a rank scales its own part of a row."""
    alone = step_of(1, plain=FP8, off=Case(), tiled=dataclasses.replace(FP8, mlp_tile_tokens=24))
    on_two = step_of(
        2,
        cp=dataclasses.replace(FP8, context=2),
        pp=dataclasses.replace(FP8, pipeline=2),
        dp=FP8,
        overlapped=dataclasses.replace(FP8, overlap_gradients=True),
        tp=dataclasses.replace(FP8, tensor=2),
    )
    plain = alone["plain"]
    for name in ("cp", "pp", "dp", "overlapped"):
        assert on_two[name][0].losses == pytest.approx(plain[0].losses, rel=1e-6), name
        assert_same(joined(on_two[name], "gradients"), joined(plain, "gradients"), 1e-5)
        assert_same(joined(on_two[name], "weights"), joined(plain, "weights"), 1e-3)
    assert_same(joined(alone["tiled"], "gradients"), joined(plain, "gradients"), 1e-5)
    off, tp = alone["off"][0].losses, on_two["tp"][0].losses
    assert plain[0].losses == pytest.approx(off, rel=2e-2)
    assert plain[0].losses != pytest.approx(off, rel=1e-5)
    assert tp == pytest.approx(off, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [None, False])
def test_recomputation_on_tensor_parallel_ranks_changes_no_bit(sequence_parallel: bool | None) -> None:
    tp = dataclasses.replace(FP8, tensor=2, sequence_parallel=sequence_parallel)
    found = step_of(2, **{name: dataclasses.replace(tp, **way) for name, way in WAYS.items()})
    for way in WAYS:
        for one, plain in zip(found[way], found["none"], strict=True):
            assert one.losses == plain.losses
            for name, (gradient, _) in plain.gradients.items():
                assert torch.equal(one.gradients[name][0], gradient), (way, name)


def test_frozen_weights_change_no_gradient_of_the_others() -> None:
    frozen, trained = (
        run_ranks("tests.megatron.tiled_mlp_jobs:gradients_of", 1, FP8, trainable, cpu_only=True)[0]
        for trainable in (FROZEN, {})
    )
    assert frozen.keys() < trained.keys()
    for name, gradient in frozen.items():
        assert torch.equal(gradient, trained[name]), name


def test_a_checkpoint_goes_on_without_fp8(tmp_path: Path) -> None:
    ((before, after, changes),) = run_ranks(f"{JOBS}:resumed", 1, tmp_path, cpu_only=True)
    assert max(after) < before[0]
    assert changes == ["parallel.fp8_linears was True and is the default"]


def test_no_tokens_are_an_empty_product() -> None:
    assert run_ranks(f"{JOBS}:sizes_without_tokens", 1, cpu_only=True) == [([0, 3, 16], [0, 3, 32])]


def test_gpus_without_fp8_are_refused() -> None:
    (message,) = run_ranks(f"{JOBS}:refusal", 1, cpu_only=True)
    assert "A100 has 8.0: set parallel.fp8_linears to false" in message


SHAPES_OF_1B = [(3072, 2048), (2048, 2048), (16_384, 2048), (2048, 8192)]
TOKENS = [7, 513, 4096]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FP8")
def test_outputs_and_gradients_on_a_gpu_are_the_emulated_ones() -> None:
    (found,) = run_ranks(f"{JOBS}:errors_on_gpu", 1, [(16, 32), (80, 48), *SHAPES_OF_1B], TOKENS)
    for case, errors in found.items():
        assert errors["output"] < 2.0**-5, case  # sums in the bits of Hopper's matrix units
        assert errors["input"] < 2.0**-7, case
        assert errors["weight"] == 0.0, case
        assert 0.01 < errors["output, bf16"] < 0.06, case
        assert 0.01 < errors["input, bf16"] < 0.06, case
        assert errors["weight, bf16"] < 2.0**-7, case


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FP8")
def test_a_step_on_a_gpu() -> None:
    """In bfloat16 and FP8, as trained: near the step without FP8; the same bits again, and with recomputation."""
    ways = {name: dataclasses.replace(FP8, **way) for name, way in WAYS.items()}
    cases = {"bfloat16": Case(), "again": FP8, **ways}
    (found,) = run_ranks("tests.megatron.megatron_jobs:measure_steps", 1, cases)
    first = found.pop("none")
    assert first.losses == pytest.approx(found.pop("bfloat16").losses, rel=3e-2)
    for name, other in found.items():
        assert other.losses == first.losses
        for parameter, (gradient, _) in first.gradients.items():
            assert torch.equal(gradient, other.gradients[parameter][0]), (name, parameter)
