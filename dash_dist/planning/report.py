"""A plan in words and as JSON.

Knows how a prediction is shown, every number with its unit. Does not know how it was made.
"""

from __future__ import annotations

import io
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from dash_dist.config.run import RunConfig
from dash_dist.planning.advice import what_would_help
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.calibration import Calibration
from dash_dist.planning.hardware import Machine
from dash_dist.planning.prediction import Prediction

GIB = 2**30
_WIDTH = 110

_MEMORY = {
    "weights": "weights (bf16)",
    "gradients": "gradients (fp32)",
    "optimizer": "optimizer (fp32 weights, 2 moments)",
    "activations": "activations",
    "attention": "attention work space",
    "communication": "communication buffers",
    "reserve": "CUDA context, NCCL, fragmentation",
}
_TIME = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise kernels",
    "launch": "waiting for launches",
    "exchange": "CP exchange, not hidden",
    "tensor": "TP collectives, not hidden",
    "pipeline": "PP sends",
    "bubble": "pipeline bubble",
    "reduction": "DP reduce-scatter, all-gather",
    "optimizer": "optimizer",
    "offload": "copies to and from the host, not hidden",
}
_SENT = {
    "exchange": "CP exchange of K, V, gradients",
    "summaries": "CP summaries",
    "tensor": "TP collectives",
    "pipeline": "PP sends",
    "gradients": "DP reduce-scatter, all-gather",
}


def as_text(
    config: RunConfig,
    machine: Machine,
    assumptions: Assumptions,
    asked: Prediction | None,
    refusal: str | None,
    best: list[Prediction],
    looked_at: list[Prediction],
    *,
    vocab_size: int,
    calibration: Calibration | None,
) -> str:
    """The report.

    Args:
        asked: of the configuration's own layout; None where `refusal` says why it is impossible.
        best, looked_at: from `best_layouts`.
    """
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, highlight=False, markup=False)
    console.print(
        f"{config.run.name}: {machine.gpus} x {machine.gpu.name} of {machine.memory / GIB:.1f} GiB, "
        f"{machine.gpus_per_node} a node; {config.training.global_batch_size} x {config.training.sequence_length:,} "
        f"tokens a step"
    )
    if asked is None:
        console.print(f"\nThe configuration's own layout cannot run on {machine.gpus} GPUs: {refusal}")
    else:
        console.print(f"\nThe configuration's layout: {asked.layout}")
        _print_prediction(console, asked)
    if best:
        console.print(f"\nThe best of {len(looked_at)} layouts that were looked at:")
        console.print(_best_table(best))
    for line in what_would_help(config, machine, assumptions, asked, best, looked_at, vocab_size=vocab_size):
        console.print(line)
    console.print("\nAssumed:")
    for line in _assumptions(config, machine, assumptions, calibration, vocab_size):
        console.print(f"- {line}")
    return stream.getvalue()


def _print_prediction(console: Console, prediction: Prediction) -> None:
    peak, time = prediction.peak, prediction.time
    memory = Table("memory of the fullest rank", "GiB", box=None, pad_edge=False)
    memory.columns[1].justify = "right"
    for name, label in _MEMORY.items():
        memory.add_row(label, f"{getattr(peak, name) / GIB:.2f}")
    memory.add_row("total", f"{peak.total / GIB:.2f}")
    memory.add_row("  of it torch's allocator, peak", f"{peak.allocated / GIB:.2f}")
    if peak.host:
        memory.add_row("on the host, pinned", f"{peak.host / GIB:.2f}")
    console.print(memory)
    stages = len(prediction.memory)
    where = "" if stages == 1 else f", {'first' if prediction.fullest_stage == 0 else 'last'} pipeline stage"
    verdict = "fits" if prediction.fits else "DOES NOT FIT"
    console.print(f"fullest moment: {peak.moment}{where}; {verdict} in {prediction.budget / GIB:.1f} GiB\n")

    seconds = Table("time of a step", "seconds", box=None, pad_edge=False)
    seconds.columns[1].justify = "right"
    for name, label in _TIME.items():
        if getattr(time, name):
            seconds.add_row(label, f"{getattr(time, name):.4g}")
    seconds.add_row("total", f"{time.total:.4g}")
    console.print(seconds)
    rate = prediction.tokens / time.total
    console.print(
        f"{rate:,.0f} tokens/s, {rate / prediction.layout.gpus:,.0f} "
        f"tokens/s per GPU; {prediction.flops / 1e12:,.1f} TFLOP executed per rank, "
        f"{prediction.model_flops / 1e12:,.1f} TFLOP of model over all; MFU {100 * prediction.mfu:.1f} %\n"
    )
    links = Table("sent by the busiest rank in a step", "NVLink, GB", "network, GB", box=None, pad_edge=False)
    for column in links.columns[1:]:
        column.justify = "right"
    for name, label in _SENT.items():
        sent = prediction.sent[name]
        if sent.nvlink or sent.network:
            links.add_row(label, f"{sent.nvlink / 1e9:.3g}", f"{sent.network / 1e9:.3g}")
    if links.row_count:
        console.print(links)
    if prediction.exchange.name != "none":
        console.print(
            f"exchange: {prediction.exchange.name}, {100 * prediction.exchange.coverage:.0f} % of others' chunks"
        )


def _best_table(best: list[Prediction]) -> Table:
    table = Table(
        "",
        "TP",
        "CP",
        "PP",
        "DP",
        "exchange",
        "recompute",
        "step, s",
        "MFU, %",
        "memory, GiB",
        box=None,
        pad_edge=False,
    )
    for place, one in enumerate(best, start=1):
        layout = one.layout
        table.add_row(
            f"{place}.",
            *map(str, (layout.tensor, layout.context, layout.pipeline, layout.data)),
            layout.exchange if layout.context > 1 else "-",
            str(layout.recompute),
            f"{one.seconds:.4g}",
            f"{100 * one.mfu:.1f}",
            f"{one.peak.total / GIB:.1f}",
        )
    return table


def _assumptions(
    config: RunConfig, machine: Machine, assumptions: Assumptions, calibration: Calibration | None, vocab_size: int
) -> list[str]:
    gpu = machine.gpu
    document = assumptions.document_length or config.training.sequence_length
    in_fp8 = ""
    if config.parallel.fp8_linears:
        in_fp8 = f", those in FP8 {100 * assumptions.fp8_efficiency:.0f} % of twice the peak,"
    coverage = "from both" if assumptions.coverage is None else f"{assumptions.coverage:g}"
    kernels = "measured on it (docs/results)" if gpu.measured else "NOT measured on it: scaled from an H200 by peaks"
    lines = [
        f"density {assumptions.density:g} in every layer; independence of neighbouring tokens "
        f"{assumptions.independence:g} (0 correlated, 1 independent); coverage {coverage}; "
        f"a token's document has {document:,.0f} tokens; vocabulary {vocab_size:,}",
        f"{gpu.name}: {gpu.flops / 1e12:,.0f} TFLOP/s bf16 and {gpu.bandwidth / 1e12:.2f} TB/s (published), of which "
        f"matrix products reach {100 * assumptions.matmul_efficiency:.0f} %{in_fp8} and element-wise kernels "
        f"{100 * assumptions.memory_efficiency:.0f} %; attention: {kernels}",
        f"links, each direction and GPU: {gpu.nvlink / 1e9:.0f} GB/s in a node, {machine.network / 1e9:.0f} GB/s "
        f"between nodes; {machine.latency * 1e6:.0f} us a message; no collisions",
        "the exchange of K and V overlaps the attention on the own shard; TP collectives block the forward pass and "
        "overlap products in the backward pass; "
        "gradients are summed after the last backward pass; PP is 1F1B",
        f"outside of torch's allocator: {assumptions.context_gib:g} GiB"
        + (f" and {assumptions.nccl_gib:g} GiB for NCCL" if machine.gpus > 1 else "")
        + f"; fragmentation {100 * assumptions.fragmentation:.0f} % of activations and work space",
        "not counted: reading data, saving checkpoints, recording routing, other programs",
    ]
    if calibration is not None:
        lines.append(str(calibration))
    return lines


def as_json(
    machine: Machine,
    assumptions: Assumptions,
    asked: Prediction | None,
    refusal: str | None,
    best: list[Prediction],
    looked_at: list[Prediction],
    *,
    vocab_size: int,
) -> dict[str, Any]:
    """The same numbers in bytes, seconds and FLOPs."""
    return {
        "machine": asdict(machine),
        "assumptions": asdict(assumptions),
        "vocab_size": vocab_size,
        "config": None if asked is None else prediction_as_json(asked),
        "refusal": refusal,
        "best": [prediction_as_json(one) for one in best],
        "layouts": len(looked_at),
        "fitting": sum(one.fits for one in looked_at),
    }


def prediction_as_json(prediction: Prediction) -> dict[str, Any]:
    """One prediction."""
    peak = prediction.peak
    return {
        "layout": asdict(prediction.layout) | {"recompute": str(prediction.layout.recompute)},
        "fits": prediction.fits,
        "memory_bytes": {**asdict(peak), "allocated": peak.allocated, "total": peak.total},
        "fullest_stage": prediction.fullest_stage,
        "seconds": {f.name: getattr(prediction.time, f.name) for f in fields(prediction.time)}
        | {"total": prediction.seconds},
        "sent_bytes": {name: asdict(sent) for name, sent in prediction.sent.items()},
        "exchange": prediction.exchange.name,
        "coverage": prediction.exchange.coverage,
        "flops_per_rank": prediction.flops,
        "model_flops": prediction.model_flops,
        "mfu": prediction.mfu,
        "tokens": prediction.tokens,
    }
