"""The released DashAttention (fasa-org/dash-attention, forward only) on a case's inputs, in a process of its own.

An illegal memory access, which it is known for above 64K tokens, leaves a CUDA context unusable, and every later column
would be lost with it. `python -m tools.benchmarks.kernels.peer REQUEST.json` is that process: it draws the same inputs
from the same seed, and leaves times, checks and a sample of its output in files next to the request.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tools.benchmarks.common.inputs import Case, fingerprint, make_inputs
from tools.benchmarks.kernels.measure import Cell, describe, measure

TIMEOUT = 400  # seconds; the first call compiles and tunes three kernels
SAMPLED_TOKENS = 1024
# The peer rounds scaled queries and summaries to the inputs' dtype, multiplies in TF32 and stops its search of tau
# after three steps, so some tokens select chunks at the edge that are not in the exact support. Outputs that have
# nothing to do with each other differ by 1.4.
LARGEST_DIFFERENCE = 0.3


@dataclass(frozen=True)
class PeerResult:
    """density: of the peer's own routing. difference: relative (Frobenius), of sampled output tokens, to ours."""

    cell: Cell
    density: float | None = None
    difference: float | None = None


def sampled_tokens(case: Case) -> torch.Tensor:
    """Token indices, evenly spread over the sequence, at which outputs are compared."""
    return torch.linspace(0, case.seq_len - 1, min(SAMPLED_TOKENS, case.seq_len)).long()


def measure_peer(
    directory: Path, case: Case, routing_scale: float, sigma: float, our_fingerprint: int, our_rows: torch.Tensor
) -> PeerResult:
    """Times the checkout at `directory` and compares it with our_rows [tokens, Hq, D], our output at sampled_tokens.

    Everything that goes wrong over there is the cell's error; so are outputs further apart than LARGEST_DIFFERENCE.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(
            json.dumps(
                {
                    "directory": str(directory.resolve()),
                    "case": asdict(case),
                    "routing_scale": routing_scale,
                    "sigma": sigma,
                }
            )
        )
        search_path = os.pathsep.join([str(Path(__file__).parents[3]), *os.environ.get("PYTHONPATH", "").split(":")])
        try:
            process = subprocess.run(
                [sys.executable, "-m", "tools.benchmarks.kernels.peer", str(request)],
                env=os.environ | {"PYTHONPATH": search_path},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return PeerResult(Cell(error=describe(error)))
        answer = request.with_name("answer.json")
        if not answer.exists():
            last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
            return PeerResult(Cell(error=f"process ended with {process.returncode}: {last_line}"))
        return _compare(json.loads(answer.read_text()), request.with_name("rows.pt"), our_fingerprint, our_rows)


def _compare(answer: dict, rows: Path, our_fingerprint: int, our_rows: torch.Tensor) -> PeerResult:
    cell = Cell(**answer["cell"])
    if cell.error:
        return PeerResult(cell)
    if answer["fingerprint"] != our_fingerprint:
        return PeerResult(Cell(error="the peer's process drew other inputs from the same seed"))
    peer_rows = torch.load(rows).double()
    ours = our_rows.cpu().double()
    difference = ((peer_rows - ours).norm() / ours.norm()).item()
    if not difference <= LARGEST_DIFFERENCE:  # NaN as well
        cell = Cell(error=f"outputs differ by {difference:.3f} of their norm, more than {LARGEST_DIFFERENCE}")
    return PeerResult(cell, answer["density"], difference)


def _serve(request: Path) -> None:
    asked = json.loads(request.read_text())
    case = Case(**asked["case"])
    try:
        answer = _run(Path(asked["directory"]), case, asked["routing_scale"], asked["sigma"], request.parent)
    except Exception as error:
        answer = {"cell": asdict(Cell(error=describe(error)))}
    (request.parent / "answer.json").write_text(json.dumps(answer))


def _run(directory: Path, case: Case, routing_scale: float, sigma: float, folder: Path) -> dict:
    sys.path.insert(0, str(directory))

    inputs = make_inputs(case, torch.device("cuda"))
    bits = fingerprint(inputs)
    # After the inputs: importing it lowers the precision of float32 products.
    dash_attn = importlib.import_module("dash_attn").dash_attn
    summary_query = inputs.summary_query
    q, k, v = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))  # the layout it asks for
    del inputs

    def module(*, count_chunks: bool) -> torch.nn.Module:
        return dash_attn(
            chunk_size=case.chunk_size,
            enable_gqa=True,
            estimate_diagonal=True,  # the prior relative to its mean, as prior_sigma means it here
            scaling_factor=routing_scale,
            return_active_blocks=count_chunks,
            max_chunks=math.ceil(case.seq_len / case.chunk_size),
            sigma=sigma,
        )

    timed = module(count_chunks=False)

    def call() -> tuple[torch.Tensor]:
        with torch.no_grad():
            return (timed(q, k, v, summary_query),)

    cell = measure(call)
    if cell.error:
        return {"cell": asdict(cell)}
    with torch.no_grad():
        out, selected = module(count_chunks=True)(q, k, v, summary_query)  # [1, Hq, T, D], [1, Hkv, T]
    rows = out[0, :, sampled_tokens(case).to(out.device)].transpose(0, 1)
    torch.save(rows.cpu(), folder / "rows.pt")
    density = int(selected.sum(dtype=torch.int64)) / case.available
    return {"cell": asdict(cell), "fingerprint": bits, "density": density}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
