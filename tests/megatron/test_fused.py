"""The step in fused kernels against the step in PyTorch: loss and all gradients."""

import dataclasses
import os
from typing import Literal
from unittest import mock

import pytest
import torch

from tests.megatron.test_layouts import assert_same, joined
from tests.support.cases import asked, exhaustive
from tests.support.models import Case, Measured
from tests.support.ranks import run_ranks

# The interpreter takes up to half a minute for each.
ALONE = {
    "tied, recompute": Case(tie_embeddings=True, recompute="full"),
    "olmo": Case(family="olmo2"),
    "norms of queries and keys": Case(micro_batch_size=4, family="qwen3"),
}
ON_TWO = {
    "tp, in pieces": Case(micro_batch_size=4, tensor=2, logits_per_piece=2 * 16 * 24),
    "cp, packed": Case(context=2, packed=True),
}


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[str, list[tuple[Measured, Measured]]]:
    """Case -> of each rank, the step in PyTorch and in kernels."""
    by_case, names = {}, asked(request, "name")
    for of_ranks, ranks in ((ALONE, 1), (ON_TWO, 2)):
        cases = {name: case for name, case in of_ranks.items() if name in names}
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # where tests have a GPU, it is not set
            found = run_ranks("tests.megatron.fused_jobs:measure_both", ranks, cases, cpu_only=True)
        by_case |= {name: [of_rank[name] for of_rank in found] for name in cases}
    return by_case


@pytest.mark.slow
@pytest.mark.parametrize("name", exhaustive([*ALONE, *ON_TWO], {"tied, recompute", "olmo", "tp, in pieces"}))
def test_kernels_give_the_step_of_pytorch(name: str, measured: dict[str, list[tuple[Measured, Measured]]]) -> None:
    plain, fused = ([pair[i] for pair in measured[name]] for i in (0, 1))
    for before, after in zip(plain, fused, strict=True):
        assert after.losses == pytest.approx(before.losses, rel=1e-6)
        assert after.tokens == before.tokens
        assert dataclasses.astuple(after)[0] == dataclasses.astuple(before)[0]
    assert_same(joined(fused, "gradients"), joined(plain, "gradients"), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: bfloat16, and no interpreter")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_on_a_gpu(family: Literal["llama", "qwen3"]) -> None:
    """In bfloat16, as trained: near the step in PyTorch, and the same bits again."""
    case = Case(family=family)
    plain, fused, again = (
        run_ranks("tests.megatron.megatron_jobs:measure_step", 1, dataclasses.replace(case, fused_kernels=kernels))
        for kernels in (False, True, True)
    )
    assert fused[0].losses == pytest.approx(plain[0].losses, rel=1e-2)
    assert_same(joined(fused, "gradients"), joined(plain, "gradients"), 5e-2)
    for name, gradient in joined(fused, "gradients").items():
        assert torch.equal(gradient, joined(again, "gradients")[name]), name
