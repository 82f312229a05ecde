"""One cell: its texts written, its model trained by the project's loop and tested, its result recorded.

Knows the order; does not know settings of models. A time limit stops a training with a checkpoint, from which the next
call goes on; a test that it stops is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.data.command import prepare
from dash_dist.run.curves import read_curves
from dash_dist.run.files import replace_text
from dash_dist.run.messages import RunSummary
from dash_dist.training.run import train
from tools.benchmarks.common.configurations import write_configuration
from tools.study.corpora import held_out_text, locked, write_corpus
from tools.study.deadline import Deadline, OutOfTime
from tools.study.methods import methods
from tools.study.parts import Cell
from tools.study.recipes import settings_of
from tools.study.results import Record
from tools.study.scoring import scorer
from tools.study.sizes import Settings, Size
from tools.study.tasks import TASKS

_PROBED = 4
"""Texts of each length on which the attention is probed."""


def identity_of(cell: Cell, size_name: str, size: Size) -> Record:
    """Return the entries of a cell's record that are known before it is measured."""
    return {
        "part": cell.part,
        "corpus": cell.corpus,
        "method": cell.method,
        "seed": cell.seed,
        "size": size_name,
        "settings": settings_of(cell, size, Path("FOLDER")),
        "tests": _tests(cell, size),
    }


def measure(cell: Cell, *, size: Size, folder: Path, deadline: Deadline, jobs: int) -> Record:
    """Train and test the model of a cell; returns the entries of its record that come of it.

    Other processes may measure cells of other runs in the same folder.

    Args:
        jobs: processes that share the GPU, this one counted.

    Raises:
        OutOfTime: it has to be called again.
        RunError: it cannot be trained or tested.
    """
    deadline.check()
    config = _config(cell, size, folder)
    with locked(folder, cell.corpus, waiting=deadline.check):
        digest = write_corpus(folder, cell.corpus, size)
        if size.processes > 1:
            for data in config.all_data:
                prepare(data, processes=size.processes, console=Console())
    deadline.check()
    most_jobs = _most_jobs(config.run.path, jobs)
    summary = train(config, requests=deadline.command)
    if not summary.completed:
        raise OutOfTime
    record: Record = {"texts": digest, "jobs": most_jobs, "training": _training(summary, config)}
    if cell.corpus in TASKS:
        record["scores"] = _scores(cell, size, config, deadline)
    return record


def _most_jobs(run: Path, jobs: int) -> int:
    """Return the most jobs of all calls that came to train or test a run, which its folder keeps."""
    run.mkdir(parents=True, exist_ok=True)
    file = run / "jobs"
    most = max(jobs, int(file.read_text()) if file.is_file() else 1)
    replace_text(file, f"{most}\n")
    return most


def _config(cell: Cell, size: Size, folder: Path) -> RunConfig:
    configs = folder / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    return load_config(write_configuration(settings_of(cell, size, folder), configs))


def _training(summary: RunSummary, config: RunConfig) -> dict[str, Any]:
    curves = read_curves(config.run.path)
    speeds = list(curves["perf/tokens_per_second_per_gpu"].values())
    return {
        "steps": summary.steps,
        "tokens": summary.tokens,
        "loss": curves["train/loss"],
        "tokens_per_second": median(speeds[len(speeds) // 2 :]),  # the first ones compile kernels
        "density": {tag: curve for tag, curve in curves.items() if tag.startswith("routing/")},
        "heldout": {tag: list(curve.values())[-1] for tag, curve in curves.items() if tag.startswith("heldout/loss")},
    }


def _tests(cell: Cell, size: Size) -> list[Settings]:
    """Return the lengths and settings of a cell's tests: its own at every length, others at that of the training."""
    if cell.corpus not in TASKS:
        return []
    common = {"samples": size.samples}
    own: list[Settings] = [{"length": length, "attention": {}, **common} for length in size.lengths]
    dials = methods(size)[cell.method].dials
    return own + [{"length": size.trained_length, "attention": dial, **common} for dial in dials]


def _scores(cell: Cell, size: Size, config: RunConfig, deadline: Deadline) -> list[Record]:
    found = []
    with scorer(config.run.path) as model:
        for test in _tests(cell, size):
            deadline.check()
            texts = [held_out_text(cell.corpus, size, test["length"], index) for index in range(test["samples"])]
            score = model.score(texts, test["attention"], probed=0 if test["attention"] else _PROBED)
            found.append({**test, **asdict(score)})
            print(f"{cell.title}: {_in_words(found[-1])}", flush=True)
    return found


def _in_words(score: Record) -> str:
    changed: Sequence[str] = [f"{name} {value:g}" for name, value in score["attention"].items()]
    accuracy = sum(score["correct"].values()) / sum(score["asked"].values())
    return " ".join([f"{score['length']} tokens", *changed, f"accuracy {accuracy:.3f}, density {score['density']:.3f}"])
