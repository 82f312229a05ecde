"""The parts of a step, from a trace of a GPU that was made by hand: rules, shares, gaps and rates."""

import gzip
import json

import pytest

from dash_dist.profiling.anatomy import Peaks, anatomy_of, over_ranks
from dash_dist.profiling.intervals import union
from dash_dist.profiling.parts import GAPS, PARTS, RULES, part_of
from dash_dist.profiling.trace import Activity, read_trace, trace_of
from dash_kernels.ranges import PREFIX
from tests.profiling.traces import TraceOfGpu, two_steps


def exclusive_by_part(anatomy):
    return {part: one.exclusive for part, one in anatomy.parts.items()}


def test_every_microsecond_of_the_steps_is_in_one_part_or_in_the_gaps():
    trace = trace_of(two_steps())
    anatomy = anatomy_of(trace)
    busy = union(piece for activity in trace.activities if not activity.on_host for piece in activity.pieces)
    shares = exclusive_by_part(anatomy)
    assert busy == 800.0
    assert sum(shares[part] for part in shares if part not in GAPS) == pytest.approx(busy)
    assert (anatomy.steps, anatomy.window, anatomy.gap) == (2, 2000.0, 1180.0)
    assert shares == pytest.approx(
        {
            "exchange": 20.0,  # of 60: attention hides the rest
            "attend": 40.0,
            "around_attention": 10.0,
            "matmul": 100.0,
            "mlp": 190.0,  # with the backward pass, whose operator is on another thread
            "gradients": 40.0,
            "optimizer": 300.0,
            "other": 100.0,
            "optimizer_gaps": 20.0,  # of its range from 430 to 470
        }
    )


def test_times_rates_and_names_are_of_one_step():
    anatomy = anatomy_of(trace_of(two_steps()))
    parts = {one.part: one for one in over_ranks([anatomy], Peaks(flops=100e12, bandwidth=1e12))}
    assert list(parts) == [part for part in PARTS if part in parts]
    product = parts["matmul"]
    assert product.seconds == pytest.approx(50e-6)
    assert product.count == 0.5
    assert product.flops_per_second == pytest.approx(2 * 1000 * 2000 * 500 / 100e-6)
    assert product.peak_share == pytest.approx(product.flops_per_second / 100e12)
    copies = parts["around_attention"]
    assert copies.bytes_per_second == pytest.approx(1000 * (2 + 4) / 10e-6)
    assert copies.peak_share == pytest.approx(copies.bytes_per_second / 1e12)
    exchange = parts["exchange"]
    assert (exchange.seconds, exchange.device_seconds) == (pytest.approx(10e-6), pytest.approx(30e-6))
    assert [one.peak_share for one in (exchange, parts["optimizer"])] == [None, None]
    assert (parts["optimizer_gaps"].device_seconds, parts["optimizer_gaps"].count) == (None, None)
    assert dict(parts["other"].names) == {"mystery": pytest.approx(50e-6)}


def test_over_ranks_there_are_the_mean_and_the_slowest():
    fast, slow = (TraceOfGpu() for _ in range(2))
    for trace, end in ((fast, 30), (slow, 90)):
        trace.range("steps", 0, 100)
        trace.range("step", 0, 100)
        trace.kernel("route_kernel", 0, end)
    slow.kernel("mystery", 90, 100)
    parts = {one.part: one for one in over_ranks([anatomy_of(trace_of(one.events)) for one in (fast, slow)], Peaks())}
    assert (parts["route"].seconds, parts["route"].seconds_max) == (pytest.approx(60e-6), pytest.approx(90e-6))
    assert (parts["other"].seconds, parts["other"].count) == (pytest.approx(5e-6), 0.5)


def test_a_copy_within_the_gpu_reads_and_writes_and_one_to_the_host_does_not_read_here():
    trace = TraceOfGpu()
    trace.range("steps", 0, 100)
    trace.range("step", 0, 100)
    trace.kernel("Memcpy DtoD (Device -> Device)", 0, 10, kind="gpu_memcpy", bytes=1000)
    trace.kernel("Memcpy DtoH (Device -> Pinned)", 0, 30, kind="gpu_memcpy", bytes=1500, stream=9)
    parts = {one.part: one for one in over_ranks([anatomy_of(trace_of(trace.events))], Peaks(bandwidth=1e9))}
    within, out = parts["pointwise"], parts["host_copies"]
    assert (within.bytes_per_second, within.peak_share) == (pytest.approx(2e8), pytest.approx(0.2))
    assert (out.bytes_per_second, out.peak_share) == (pytest.approx(5e7), None)  # the link's, not the memory's
    assert out.seconds == pytest.approx(20e-6)


@pytest.mark.parametrize(
    ("name", "ranges", "part"),
    [
        ("route_kernel", (), "route"),
        ("summary_kernel", (), "summarize"),
        ("query_bits_kernel", ("key_gradient",), "lists"),
        ("reached_kernel", (), "lists"),
        ("query_gradient_pairs_kernel", (), "query_gradient"),
        ("key_gradient_gathered_kernel", (), "key_gradient"),
        ("row_dots_kernel", (), "row_dots"),
        ("void at::native::elementwise_kernel<...>", ("key_gradient", "core attention"), "key_gradient"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", ("core attention",), "dense"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", ("core attention",), "dense"),
        ("void at::native::CatArrayBatchedCopy<...>", ("exchange", "core attention"), "packing"),
        ("void at::native::elementwise_kernel<...>", ("core attention", "attention"), "attention_rest"),
        ("void at::native::elementwise_kernel<...>", ("attention",), "around_attention"),
        ("sm90_xmma_gemm_bf16bf16", ("attention",), "matmul"),
        ("sm90_xmma_gemm_bf16bf16", ("loss",), "output_matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", (), "matmul"),
        ("void (anonymous namespace)::softmax_warp_forward", ("loss",), "loss"),
        ("ncclDevKernel_SendRecv", ("exchange", "core attention"), "exchange"),
        ("ncclDevKernel_AllReduce_Sum_f32", ("gradients",), "gradients"),
        ("ncclDevKernel_AllReduce_Sum_f32", ("optimizer",), "collectives"),
        ("Memcpy DtoH (Device -> Pinned)", ("mlp",), "host_copies"),
        ("Memcpy DtoD (Device -> Device)", (), "pointwise"),
        ("_rms_norm_forward_kernel", (), "norm"),
        ("void at::native::reduce_kernel<512, 1, ...>", ("norm",), "norm"),
        ("_swiglu_forward_kernel", (), "mlp"),
        ("indexing_backward_kernel", ("embedding",), "embedding"),
        ("triton_poi_fused_add_cos_sin_0", (), "pointwise"),
        ("triton_mystery", (), "other"),
        ("cast_rows_kernel", ("mlp",), "fp8_casts"),
        ("void at::native::elementwise_kernel<...>", ("fp8 cast", "mlp"), "fp8_casts"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n", ("mlp",), "matmul"),
        ("nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_TNN", ("mlp",), "matmul"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", ("attention",), "matmul"),
    ],
)
def test_the_part_of_a_kernel(name, ranges, part):
    assert part_of(Activity(name, (), tuple(PREFIX + one for one in ranges))) == part


def test_every_part_has_a_rule_and_every_rule_a_part():
    assert {rule.part for rule in RULES} | {"other"} == PARTS.keys()


def test_a_file_that_is_no_trace_of_steps_is_refused(tmp_path):
    path = tmp_path / "trace.json.gz"
    for content, message in (
        ({"events": []}, "has no traceEvents"),
        ({"traceEvents": []}, "has no range 'dash: steps'"),
    ):
        path.write_bytes(gzip.compress(json.dumps(content).encode()))
        with pytest.raises(ValueError, match=message):
            read_trace(path)
    path.with_suffix("").write_text(json.dumps({"traceEvents": two_steps()}))
    assert read_trace(path.with_suffix("")).steps == 2
