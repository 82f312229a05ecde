"""Trains a small model from scratch and extends its context eightfold; writes losses by position, retrieval, density.

    python -m tools.benchmarks.extension FOLDER --out docs/results/extension.json

Knows the order of the runs; does not know their settings.
"""

from __future__ import annotations

import functools
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console

from dash_dist.checkpoints.commands import export
from dash_dist.checkpoints.folders import visible_checkpoints
from dash_dist.config.file import load_config
from dash_dist.evaluation.command import Options, evaluate
from dash_dist.hf.command import generate
from dash_dist.importing.command import import_model
from dash_dist.run.curves import read_curves
from dash_dist.training.run import train
from tools.benchmarks.common.configurations import write_configuration
from tools.benchmarks.common.conversations import write_template
from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.extension.corpus import TEMPLATE, write_code, write_copies, write_questions
from tools.benchmarks.extension.recipes import SIZES, Settings, Size, extension, from_scratch, untrained
from tools.benchmarks.extension.table import as_markdown

T = TypeVar("T")

_PROGRAM = "tools.benchmarks.extension"


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for text, tokens, runs and models.")],
    out: Annotated[Path, typer.Option(help="Results as JSON, with a table beside it as .md.")],
    size: Annotated[str, typer.Option(help="gpu, or cpu to try the program out.")] = "gpu",
    samples: Annotated[int, typer.Option(help="Samples of each retrieval task and length.")] = 8,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Run all parts in one process. The results are written after each part."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size}: give one of {', '.join(SIZES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = describe_environment(_PROGRAM, sys.argv[1:], commit=commit, device=device) | {"size": size}
    _Experiment(SIZES[size], folder.absolute(), out, samples, record).run()


class _Experiment:
    """One experiment. `record` is what is written."""

    def __init__(self, size: Size, folder: Path, out: Path, samples: int, record: dict[str, Any]) -> None:
        self._size, self._folder, self._out, self._samples = size, folder, out, samples
        self._record = record | {"seconds": {}, "runs": {}}

    def run(self) -> None:
        size, folder = self._size, self._folder
        self._timed("text", self._write_text)
        self._timed("training from scratch", lambda: self._train(from_scratch(size, folder)))
        exported, imported = folder / "exported", folder / "imported"
        self._export("base", exported)
        self._record["parity"] = self._timed("import", lambda: import_model(str(exported), imported))
        self._timed("untrained", lambda: self._train(untrained(size, folder, imported)))
        for kind in ("dash", "dense"):
            settings = extension(size, folder, imported, kind)
            self._timed(f"{kind} extension", functools.partial(self._train, settings))
        self._export("dash", folder / "extended")
        self._record["text"] = self._timed("generation", self._generate)
        evaluated = {
            "base": [length for length in size.evaluated if length <= size.lengths[0]],
            "dash": list(size.evaluated),
            "dense": list(size.evaluated),
            "untrained": [size.evaluated[-1]],
        }
        for name, lengths in evaluated.items():
            self._timed(f"retrieval, {name}", functools.partial(self._evaluate, name, lengths))
        self._write()

    def _write_text(self) -> None:
        size, folder = self._size, self._folder
        write_code(folder / "text", document=size.lengths[-1], megabytes=size.megabytes)
        write_template(folder / TEMPLATE)
        write_copies(folder, size.copies, size.copied)
        write_questions(folder, size.questions)

    def _train(self, settings: Settings) -> None:
        name = settings["run"]["name"]
        summary = train(load_config(write_configuration(settings, self._folder)))
        curves = read_curves(self._folder / "runs" / name)
        self._record["runs"][name] = {
            "tokens": summary.tokens,
            "last_loss": summary.last_loss,
            "tokens_per_second": {
                step: value for step, value in curves["perf/tokens_per_second_per_gpu"].items() if step > 1
            },
            "heldout": {
                tag: list(curve.items())[-1] for tag, curve in curves.items() if tag.startswith("heldout/loss")
            },
            "density": {tag: curve for tag, curve in curves.items() if tag.startswith("routing/")},
        }

    def _evaluate(self, name: str, lengths: list[int]) -> None:
        options = Options(lengths=tuple(str(length) for length in lengths), samples=self._samples)
        groups = evaluate(self._folder / "runs" / name, [], options, Console())
        self._record["runs"][name]["retrieval"] = [
            {
                "task": group.task,
                "length": group.length,
                "accuracy": group.accuracy,
                "density": group.density,
                "seconds": group.seconds,
            }
            for group in groups
        ]

    def _export(self, name: str, out: Path) -> None:
        *_, checkpoint = visible_checkpoints(self._folder / "runs" / name / "checkpoints")
        export(checkpoint, out, print)

    def _generate(self) -> str:
        written = io.StringIO()
        prompt = "def read_lines(path):\n    with open("
        generate(
            self._folder / "extended",
            prompt,
            max_new_tokens=64,
            temperature=0.0,
            routing_scale=None,
            write=written.write,
        )
        return prompt + written.getvalue()

    def _timed(self, name: str, part: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = part()
        self._record["seconds"][name] = time.perf_counter() - begin
        print(f"-- {name}: {self._record['seconds'][name]:.1f} s", flush=True)
        self._write()
        return result

    def _write(self) -> None:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(self._record, indent=1) + "\n")
        self._out.with_suffix(".md").write_text(as_markdown(self._record))


if __name__ == "__main__":
    typer.run(main)
