"""One model of the extension: trained, exported and asked, its results in a file.

    python -m tools.benchmarks.extension.part RUN.yaml RESULTS.json --length 8192 --samples 8

Runs of one experiment are independent, and each is a process. Knows one run; does not know its settings or the others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dash_dist.checkpoints.commands import export
from dash_dist.checkpoints.folders import visible_checkpoints
from dash_dist.config.file import load_config
from dash_dist.evaluation.command import Options, evaluate
from dash_dist.run.curves import read_curves
from dash_dist.run.files import replace_json
from dash_dist.training.run import train


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")],
    results: Annotated[Path, typer.Argument(help="New file for the results as JSON.")],
    length: Annotated[list[int] | None, typer.Option(help="Tokens at which retrieval is tested.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="Of `dash-dist evaluate`. Default: retrieval.")] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task and length.")] = 8,
    exported: Annotated[Path | None, typer.Option(help="Folder for the model in transformers' format.")] = None,
) -> None:
    """Train a run, export it, and test its retrieval. The results are written after each of these and each suite."""
    _Part(config, results).run(length or [], suite or ["retrieval"], samples, exported)


class _Part:
    def __init__(self, config: Path, results: Path) -> None:
        self._config, self._results = config, results
        run = load_config(config).run
        self._run = Path(run.directory) / run.name
        self._record: dict[str, Any] = {"seconds": {}}

    def run(self, lengths: list[int], suites: list[str], samples: int, exported: Path | None) -> None:
        self._timed("training", self._train)
        if exported is not None:
            self._timed("export", lambda: self._export(exported))
        for suite in suites if lengths else ():
            self._timed(suite, functools.partial(self._evaluate, lengths, suite, samples))

    def _train(self) -> dict[str, Any]:
        summary = train(load_config(self._config))
        curves = read_curves(self._run)
        speeds = curves.get("perf/tokens_per_second_per_gpu", {})
        return {
            "tokens": summary.tokens,
            "last_loss": summary.last_loss,
            "tokens_per_second": {step: value for step, value in speeds.items() if step > 1},
            "heldout": {
                tag: list(curve.items())[-1] for tag, curve in curves.items() if tag.startswith("heldout/loss")
            },
            "heldout_by_stage": curves.get("heldout/loss", {}),
            "density": {tag: curve for tag, curve in curves.items() if tag.startswith("routing/")},
        }

    def _export(self, out: Path) -> dict[str, Any]:
        *_, checkpoint = visible_checkpoints(self._run / "checkpoints")
        export(checkpoint, out, print)
        return {"exported": str(out)}

    def _evaluate(self, lengths: list[int], suite: str, samples: int) -> dict[str, Any]:
        options = Options(lengths=tuple(str(length) for length in lengths), suite=suite, samples=samples)
        found = [
            {
                "task": group.task,
                "length": group.length,
                "accuracy": group.accuracy,
                "density": group.density,
                "seconds": group.seconds,
            }
            for group in evaluate(self._run, [], options, Console())
        ]
        return {"retrieval": self._record.get("retrieval", []) + found}

    def _timed(self, name: str, part: Callable[[], dict[str, Any]]) -> None:
        begin = time.perf_counter()
        found = part()
        self._record["seconds"][name] = time.perf_counter() - begin
        self._record |= found
        print(f"-- {name}: {self._record['seconds'][name]:.1f} s", flush=True)
        replace_json(self._results, self._record)


if __name__ == "__main__":
    typer.run(main)
