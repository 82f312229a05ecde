"""One row of the benchmark, measured on the current CUDA device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.benchmarks.common.inputs import Case, Inputs, fingerprint, make_inputs
from tools.benchmarks.kernels.columns import DENSE, PEER_SIGMA, Stages, dash, dense, forward, forward_backward
from tools.benchmarks.kernels.density import find_routing_scale
from tools.benchmarks.kernels.measure import Function, describe, kernel_times, measure
from tools.benchmarks.kernels.peer import measure_peer, sampled_tokens
from tools.benchmarks.kernels.results import (
    FORWARD,
    FORWARD_FIRST,
    FORWARD_PEER_SIGMA,
    PEER,
    STEP,
    STEP_FIRST,
    Row,
)

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Extent:
    """Which columns a run has: dense ones up to dense_limit tokens (0: none), ours with attend_first_chunk as well, the
    peer's from a checkout of it.
    """

    dense_limit: int
    forward_only: bool
    first_chunk: bool
    peer: Path | None


def run_row(case: Case, extent: Extent) -> Row:
    """Measures what `extent` asks for; whatever fails is in the row as text."""
    row = Row(case)
    with _recorded(row, "inputs and routing_scale"):
        inputs = make_inputs(case, DEVICE)
        stages = Stages(case, inputs)
        row.routing_scale = find_routing_scale(lambda scale: stages.selected(scale) / case.available, case)
        row.selected = stages.selected(row.routing_scale)
    if row.routing_scale is None or row.selected is None:
        return row
    for name, function in _functions(case, inputs, row.routing_scale, extent).items():
        row.columns[name] = measure(function)
        print(f"{row.label}: {name}: {row.columns[name].median_ms} ms", flush=True)
    with _recorded(row, "tile efficiency"):
        row.tile_efficiency = stages.tile_efficiency(row.routing_scale)
    with _recorded(row, "stages"):
        row.stages = stages.split(row.routing_scale, forward_only=extent.forward_only)
    attention = dash(case, row.routing_scale, case.prior_sigma)
    with _recorded(row, "kernels"):
        row.kernels = kernel_times((forward if extent.forward_only else forward_backward)(attention, inputs))
    if extent.peer is not None:
        with _recorded(row, PEER):
            _run_peer(row, inputs, row.routing_scale, extent.peer)
    return row


def _functions(case: Case, inputs: Inputs, routing_scale: float, extent: Extent) -> dict[str, Function]:
    ours = dash(case, routing_scale, case.prior_sigma)
    functions = {FORWARD: forward(ours, inputs)}
    if not extent.forward_only:
        functions[STEP] = forward_backward(ours, inputs)
    if extent.first_chunk:
        with_first = dash(case, routing_scale, case.prior_sigma, attend_first_chunk=True)
        functions[FORWARD_FIRST] = forward(with_first, inputs)
        if not extent.forward_only:
            functions[STEP_FIRST] = forward_backward(with_first, inputs)
    if case.seq_len <= extent.dense_limit:
        for name, kernel in DENSE.items():
            functions[f"{name} fwd"] = forward(dense(kernel), inputs)
            if not extent.forward_only:
                functions[f"{name} fwd+bwd"] = forward_backward(dense(kernel), inputs)
    if extent.peer is not None:
        functions[FORWARD_PEER_SIGMA] = forward(dash(case, routing_scale, PEER_SIGMA), inputs)
    return functions


def _run_peer(row: Row, inputs: Inputs, routing_scale: float, directory: Path) -> None:
    (out,) = forward(dash(row.case, routing_scale, PEER_SIGMA), inputs)()
    rows = out[0, sampled_tokens(row.case).to(out.device)]  # [tokens, Hq, D]
    del out
    torch.cuda.empty_cache()  # the other process needs the memory
    result = measure_peer(directory, row.case, routing_scale, PEER_SIGMA, fingerprint(inputs), rows)
    row.columns[PEER] = result.cell
    row.peer_density, row.peer_difference = result.density, result.difference
    print(f"{row.label}: {PEER}: {result}", flush=True)


@contextlib.contextmanager
def _recorded(row: Row, what: str) -> Iterator[None]:
    """Write a failure of this step into the row, and continue the benchmark."""
    try:
        yield
    except Exception as error:
        row.errors[what] = describe(error)
