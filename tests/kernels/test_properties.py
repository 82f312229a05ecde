"""Random shapes, settings and documents against the float64 reference."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from dash_kernels import dash_attention, reference_dash_attention
from tests.kernels.attention_inputs import DEVICE, assert_near, output_and_gradients, random_inputs, selection_margin
from tests.support.cases import exhaustive

pytestmark = pytest.mark.slow

EXAMPLES_ON_TRITON = 6 if DEVICE == "cpu" else 60  # the interpreter takes seconds for one


@dataclass(frozen=True)
class Precision:
    """Dtype in which a backend is tested, and its tolerance where no score is nearer to its threshold than margin:
    where a rounding changes what is selected, the mean of log P jumps.
    """

    backend: str
    dtype: torch.dtype
    tolerance: float
    alphas: tuple[float, ...]
    max_examples: int
    margin: float = 0.0


PRECISIONS = {
    "eager": Precision("eager", torch.float64, 1e-9, (1.5, 2.0, 1.3), max_examples=150),
    "triton float32": Precision("triton", torch.float32, 2e-4, (1.5,), max_examples=EXAMPLES_ON_TRITON, margin=1e-4),
    "triton float16": Precision("triton", torch.float16, 1e-2, (1.5,), max_examples=EXAMPLES_ON_TRITON, margin=1e-4),
}


@dataclass(frozen=True)
class Case:
    seed: int
    seq_len: int
    cuts: list[int] | None  # where a document ends and the next starts; equal ones make empty documents
    kv_heads: int
    group: int
    head_dim: int
    chunk_size: int
    alpha: float
    prior_sigma: float | None
    routing_scale: float


@st.composite
def cases(draw: st.DrawFn, alphas: tuple[float, ...]) -> Case:
    seq_len = draw(st.integers(1, 140))
    cuts = st.lists(st.integers(0, seq_len), max_size=6).map(sorted)
    return Case(
        seed=draw(st.integers(0, 2**31)),
        seq_len=seq_len,
        cuts=draw(st.none() | cuts),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, 2, 3, 4, 8))),
        head_dim=draw(st.sampled_from((8, 16, 32, 40, 64))),
        chunk_size=draw(st.sampled_from((16, 32, 48))),
        alpha=draw(st.sampled_from(alphas)),
        prior_sigma=draw(st.sampled_from((None, 0.5, 1.0, 2.0))),
        routing_scale=draw(st.sampled_from((0.5, 2.0, 8.0, 30.0))),
    )


@pytest.mark.parametrize("name", exhaustive(PRECISIONS, ["triton float16"]))
def test_equals_the_reference(name: str) -> None:
    precision = PRECISIONS[name]

    @settings(
        deadline=None,
        max_examples=precision.max_examples,
        phases=set(Phase) - ({Phase.shrink} if precision.backend == "triton" else set()),  # it would take minutes
        suppress_health_check=[HealthCheck.filter_too_much],
    )
    @given(case=cases(precision.alphas))
    def check(case: Case) -> None:
        inputs = random_inputs(
            case.seq_len,
            kv_heads=case.kv_heads,
            group=case.group,
            head_dim=case.head_dim,
            batch=1 if case.cuts is not None else 2,
            dtype=precision.dtype,
            seed=case.seed,
        )
        bounds = None if case.cuts is None else [0, *case.cuts, case.seq_len]
        call = {
            "chunk_size": case.chunk_size,
            "alpha": case.alpha,
            "prior_sigma": case.prior_sigma,
            "routing_scale": case.routing_scale,
            "cu_seqlens": None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
        }
        if precision.margin > 0:
            assume(selection_margin(inputs, call, call["cu_seqlens"]) > precision.margin)
        expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
        actual = output_and_gradients(dash_attention, inputs, backend=precision.backend, **call)
        assert_near(actual, expected, precision.tolerance)

    check()
