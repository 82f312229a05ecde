"""Operations and bytes of operators, as PyTorch's profiler describes their tensors."""

import json

import pytest
import torch

from dash_dist.profiling.flops import moved_bytes, product_flops
from dash_dist.profiling.trace import trace_of
from dash_kernels.backend import select_backend
from dash_kernels.ranges import named_range
from dash_kernels.spec import AttentionSpec


def traced(function, tmp_path):
    """Return the events of a call under the profiler, as one step."""
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler,
        named_range("steps"),
        named_range("step"),
    ):
        function()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    return json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda: torch.ones(3, 4) @ torch.ones(4, 5), 2 * 3 * 4 * 5),
        (lambda: torch.addmm(torch.ones(5), torch.ones(3, 4), torch.ones(4, 5)), 2 * 3 * 4 * 5),
        (lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.baddbmm(torch.ones(2, 3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.nn.functional.linear(torch.ones(2, 3, 4), torch.ones(5, 4)), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.ones(3, 4) * 2, 0),
    ],
)
def test_operations_of_products_are_counted_once(function, flops, tmp_path):
    trace = trace_of(traced(function, tmp_path))
    assert sum(activity.flops or 0 for activity in trace.activities) == flops


@pytest.mark.parametrize(
    ("name", "function", "moved"),
    [
        ("aten::mul", lambda x: x * 2.0, 2 * 600 * 4),
        ("aten::add", lambda x: x + x, 3 * 600 * 4),
        ("aten::add", lambda x: x + x[:1].expand(20, 30), (600 + 30 + 600) * 4),
        ("aten::add_", lambda x: x.add_(x), 3 * 600 * 4),
        ("aten::silu", torch.nn.functional.silu, 2 * 600 * 4),
        ("aten::copy_", lambda x: torch.empty(20, 30, dtype=torch.bfloat16).copy_(x), 600 * (4 + 2)),
        ("aten::zero_", lambda x: x.zero_(), 600 * 4),
        ("aten::sin", torch.sin, None),
        ("aten::cat", lambda x: torch.cat([x, x]), None),
    ],
)
def test_bytes_of_element_wise_operators(name, function, moved, tmp_path):
    x = torch.ones(20, 30)
    found = [
        activity.moved
        for activity in trace_of(traced(lambda: function(x), tmp_path)).activities
        if activity.name == name
    ]
    assert found[-1:] == [moved]


def test_without_shapes_nothing_is_guessed():
    assert product_flops("aten::mm", {}) is None
    assert product_flops("aten::mm", {"Input Dims": [[3, 4]]}) is None
    assert moved_bytes("aten::mul", {"Input Dims": [[3, 4]]}) is None


def test_the_stages_of_the_attention_are_ranges_while_a_profiler_runs(tmp_path):
    grad = torch.ones(1, 8, 2, 16)
    spec = AttentionSpec().for_head_dim(16)

    def call():
        stages = select_backend("eager", grad, 2, spec)
        stages.row_dots(grad, grad)

    trace = trace_of(traced(call, tmp_path))
    assert {activity.context[-3] for activity in trace.activities if activity.name == "aten::mul"} == {"dash: row_dots"}
    assert select_backend("eager", grad, 2, spec).__name__ == "dash_kernels.eager"
