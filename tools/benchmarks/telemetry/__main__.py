"""Curves in TensorBoard against a profile of the same steps, and the cost of logging, on one device.

    python -m tools.benchmarks.telemetry --out docs/results/telemetry_1xh200.json

Two trainings in this process. Knows runs and results; does not know how steps are measured. The exit status is 1 if a
curve differs by more than 3 %, or if logging at every step costs more than 1 % of a step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.data.tokenizer import load_tokenizer
from dash_dist.engine.flops import flops_per_token
from dash_dist.run.curves import read_curves
from dash_dist.training.telemetry.device import peak_bf16_flops
from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.telemetry.compare import GOAL_COST, compare, cost_of_logging
from tools.benchmarks.telemetry.run import HEAT_MAP_INTERVAL, WARM_UP_STEPS, draws_heat_maps, profiled, timed
from tools.benchmarks.telemetry.spans import steps_of
from tools.benchmarks.telemetry.table import as_markdown


def main(
    out: Annotated[Path, typer.Option(help="Results as JSON, with a table beside it as .md.")],
    tokens: Annotated[int, typer.Option(help="Sequence length; one sequence a step.")] = 32_768,
    steps: Annotated[int, typer.Option(min=HEAT_MAP_INTERVAL + 1, help="Steps of the run that times logging.")] = 4
    * HEAT_MAP_INTERVAL
    + 1,
    shape: Annotated[str, typer.Option(help="1b, or tiny to try the program out on a CPU.")] = "1b",
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Train under the profiler and then without it, and compare."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    record = describe_environment("tools.benchmarks.telemetry", sys.argv[1:], commit=commit, device=device.type)
    record |= {"shape": shape, "tokens": tokens, "heat_maps": draws_heat_maps()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace = folder / "trace.json.gz"
        config = load_config(profiled(shape, tokens, folder, trace))
        # The profiler delays its first step, which a trace leaves out.
        record["rows"] = _compare(config, WARM_UP_STEPS + 2, trace, device)
    with tempfile.TemporaryDirectory() as name:  # without the checkpoint of the first run
        record["cost"] = cost_of_logging(timed(shape, tokens, Path(name), steps))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(record))
    print(as_markdown(record))
    if record["cost"]["cost_every_step"] > GOAL_COST or any(row["within"] is False for row in record["rows"]):
        raise typer.Exit(1)


def _compare(config: RunConfig, first: int, trace: Path, device: torch.device) -> list[dict[str, Any]]:
    curves = read_curves(config.run.path)
    density = list(curves["routing/mean_density"].values())[-1]
    tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
    operations = flops_per_token(
        config.model,
        config.attention,
        vocab_size=config.model.embedded_tokens(tokenizer.vocab_size),
        document_length=config.training.sequence_length,  # joined documents are one
        density=density,
    )
    return compare(curves, first, steps_of(trace), flops_per_token=operations, peak=peak_bf16_flops(device))


if __name__ == "__main__":
    typer.run(main)
