"""Extends the context of a dense model eightfold: with dense attention, DashAttention, and its first chunk attended.

    python -m tools.benchmarks.extension FOLDER --out docs/results/extension.json
    python -m tools.benchmarks.extension FOLDER --weights IMPORTED --out docs/results/extension_smollm2.json

The model is trained here on bytes, or is one that `dash-dist import` wrote, without scaled positions. Measured are
losses by position, retrieval and density. Knows the order of the runs; does not know their settings.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import typer
from rich.console import Console

from dash_dist.config.data import DataConfig
from dash_dist.config.file import load_config
from dash_dist.data.command import prepare
from dash_dist.data.tokenizer import load_tokenizer
from dash_dist.hf.command import generate
from dash_dist.importing.command import import_model
from dash_dist.run.files import read_json
from tools.benchmarks.common.configurations import write_configuration
from tools.benchmarks.common.conversations import write_template
from tools.benchmarks.common.environment import ROOT, describe_environment
from tools.benchmarks.common.imported import read_imported
from tools.benchmarks.extension.corpus import TEMPLATE, write_code, write_copies, write_questions
from tools.benchmarks.extension.recipes import (
    ATTENTION,
    BYTES,
    SIZES,
    Base,
    Settings,
    Size,
    extension,
    from_scratch,
    unchanged,
)
from tools.benchmarks.extension.table import as_markdown

T = TypeVar("T")

_PROGRAM = "tools.benchmarks.extension"
_PART = "tools.benchmarks.extension.part"
_NAMES = ("base", "unchanged", *ATTENTION)
_POLL = 2.0
_LETTERS_PER_TOKEN = 4  # of code, about, where a tokenizer is given


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for text, tokens, runs and models.")],
    out: Annotated[Path, typer.Option(help="Results as JSON, with a table beside it as .md.")],
    weights: Annotated[
        Path | None, typer.Option(help="Folder that `dash-dist import` wrote, in place of training from scratch.")
    ] = None,
    size: Annotated[str, typer.Option(help="gpu; short, for a given model; or cpu to try the program out.")] = "gpu",
    attention: Annotated[list[str] | None, typer.Option(help="Of the extended models. Default: all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once. Speeds are of one if this is 1.")] = 1,
    suite: Annotated[
        list[str] | None, typer.Option(help="Of `dash-dist evaluate`; may be repeated. Default: retrieval.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task and length.")] = 8,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Run all parts, each in a process of its own. The results are written after each."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size}: give one of {', '.join(SIZES)}")
    names = attention or list(ATTENTION)
    if not set(names) <= set(ATTENTION):
        raise typer.BadParameter(f"--attention {' '.join(names)}: give some of {', '.join(ATTENTION)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = describe_environment(_PROGRAM, sys.argv[1:], commit=commit, device=device) | {"size": size}
    experiment = _Experiment(SIZES[size], folder.absolute(), out, jobs, record)
    asked = ["--samples", str(samples)]
    for one in suite or ["retrieval"]:
        asked += ["--suite", one]
    try:
        base = None if weights is None else base_of(weights.absolute())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    experiment.run(base, names, asked)


def base_of(weights: Path) -> Base:
    """Describe a folder that `dash-dist import` wrote. Raises ValueError if its positions are scaled already."""
    section, tokenizer = read_imported(weights)
    base = Base(weights, section, tokenizer or BYTES)
    if (scaling := base.model.positions.type) != "default":
        raise ValueError(f"{weights / 'model.yaml'} scales its positions, by {scaling}: give a model without")
    return base


class _Part(NamedTuple):
    """A run, the tokens at which its retrieval is tested, and whether its model is exported."""

    settings: Settings
    lengths: Sequence[int]
    export: bool


class _Experiment:
    """One experiment. `record` is what is written."""

    def __init__(self, size: Size, folder: Path, out: Path, jobs: int, record: dict[str, Any]) -> None:
        self._size, self._folder, self._out, self._jobs = size, folder, out, jobs
        self._record = record | {"seconds": {}, "runs": {}}

    def run(self, base: Base | None, names: Sequence[str], asked: Sequence[str]) -> None:
        """Run all parts.

        Args:
            base: None to train one.
            asked: options of the retrieval tests.
        """
        size, folder = self._size, self._folder
        first, last = size.lengths[0], size.lengths[-1]
        short = [length for length in size.evaluated if length <= first]
        if not (folder / TEMPLATE).exists():  # the last file: the text of an earlier call is used again
            self._timed("text", lambda: self._write_text(base))
        for name in _NAMES:
            self._results(name).unlink(missing_ok=True)
        parts: dict[str, _Part] = {}
        if base is None:
            self._side_by_side({"base": _Part(from_scratch(size, folder), short, export=True)}, asked)
            base = self._imported()
        else:
            self._record["parity"] = json.loads((base.weights / "import.json").read_text())["logits_difference"]
            parts["base"] = _Part(unchanged(size, folder, base, "base", first), short, export=False)
        parts["unchanged"] = _Part(unchanged(size, folder, base, "unchanged", last), [last], export=False)
        parts |= {name: _Part(extension(size, folder, base, name), size.evaluated, export=True) for name in names}
        self._side_by_side(parts, asked)
        self._record["text"] = self._timed("generation", lambda: self._generate(folder / "exported" / names[-1]))
        self._write()

    def _write_text(self, base: Base | None) -> None:
        size, folder = self._size, self._folder
        spec = BYTES if base is None else base.tokenizer
        letters = 1 if spec == BYTES else _LETTERS_PER_TOKEN
        write_code(folder / "text", document=size.lengths[-1] * letters, megabytes=size.megabytes)
        if base is None:
            write_copies(folder, size.scratch.copies, size.scratch.copied)
        write_questions(folder, load_tokenizer(spec), size.questions)
        write_template(folder / TEMPLATE)

    def _imported(self) -> Base:
        imported = self._folder / "imported"
        exported = str(self._folder / "exported" / "base")
        self._record["parity"] = self._timed("import", lambda: import_model(exported, imported))
        return base_of(imported)

    def _side_by_side(self, parts: Mapping[str, _Part], asked: Sequence[str]) -> None:
        """Run the parts, `jobs` at once. A part that fails ends the others."""
        configs = {name: write_configuration(part.settings, self._folder) for name, part in parts.items()}
        self._timed(f"tokens of {len(parts)} runs", lambda: _tokenise(configs.values()))
        waiting = list(parts)
        with ExitStack() as cleanup:
            running: dict[str, subprocess.Popen[bytes]] = {}
            while waiting or running:
                while waiting and len(running) < self._jobs:
                    name = waiting.pop(0)
                    running[name] = process = self._start(name, configs[name], parts[name], asked)
                    cleanup.callback(process.kill)
                time.sleep(_POLL)
                ended = {name: code for name, process in running.items() if (code := process.poll()) is not None}
                for name, code in ended.items():
                    del running[name]
                    print(f"-- {name} ended", flush=True)
                    if code:
                        raise RuntimeError(f"{name} failed with {code}: see {self._log(name)}")
                self._write()

    def _start(self, name: str, config: Path, part: _Part, asked: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", _PART, str(config), str(self._results(name)), *asked]
        for length in part.lengths:
            command += ["--length", str(length)]
        if part.export:
            command += ["--exported", str(self._folder / "exported" / name)]
        with self._log(name).open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    def _results(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _generate(self, model: Path) -> str:
        written = io.StringIO()
        prompt = "def read_lines(path):\n    with open("
        generate(model, prompt, max_new_tokens=64, temperature=0.0, routing_scale=None, write=written.write)
        return prompt + written.getvalue()

    def _timed(self, name: str, part: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = part()
        self._record["seconds"][name] = time.perf_counter() - begin
        print(f"-- {name}: {self._record['seconds'][name]:.1f} s", flush=True)
        self._write()
        return result

    def _write(self) -> None:
        for name in _NAMES:
            if (found := read_json(self._results(name))) is not None:
                self._record["runs"][name] = found
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(self._record, indent=1) + "\n")
        self._out.with_suffix(".md").write_text(as_markdown(self._record))


def _tokenise(configs: Iterable[Path]) -> None:
    """Prepare the data of all runs, which would do so side by side, each for itself."""
    prepared: list[DataConfig] = []
    for data in itertools.chain.from_iterable(load_config(config).all_data for config in configs):
        if data not in prepared:
            prepare(data, processes=len(os.sched_getaffinity(0)), console=Console())
            prepared.append(data)


if __name__ == "__main__":
    typer.run(main)
