"""The configuration of a cell's run.

Knows sections of a configuration; does not know results.
"""

from __future__ import annotations

from pathlib import Path

from tools.study.corpora import code_data, first_data, task_data
from tools.study.methods import methods
from tools.study.parts import Cell
from tools.study.sizes import Settings, Size, Training
from tools.study.tasks import TASKS

_EDGES = (1024, 4096, 8192, 16384)
"""Ends of the buckets of positions."""
_WARMUP = 30
"""Steps of a stage in which its learning rate rises."""


def settings_of(cell: Cell, size: Size, folder: Path) -> Settings:
    """Return the configuration of a cell whose texts and runs are in `folder`."""
    of_task = cell.corpus in TASKS
    training = size.tasks if of_task else size.language
    steps = size.task_steps if of_task else training.steps
    settings = {
        "run": {"name": cell.run, "directory": str(folder / "runs"), "seed": cell.seed},
        "attention": methods(size)[cell.method].attention,
        "optimizer": _optimizer(training, min(size.first_steps, training.steps)),
        "checkpoint": {"interval": max(1, steps // 4), "keep": 1, "asynchronous": False},
        "logging": {
            "interval": max(1, steps // 50),
            "routing_interval": max(1, steps // 10),
            "heat_map_layers": [],
        },
    }
    rest = _task(cell, size, folder) if of_task else _language(cell, size, folder)
    rest["data"] |= {"cache": str(folder / "tokens"), "shuffle_seed": cell.seed}
    return settings | rest


def _task(cell: Cell, size: Size, folder: Path) -> Settings:
    training = size.tasks
    lengths = list(size.texts)
    first = [
        {"name": name, "steps": size.first_steps, "training": {"sequence_length": size.first_tokens}, "data": data}
        for name, data in first_data(folder, cell.corpus).items()
    ]
    stages = [
        {"name": f"{length}", "steps": training.steps, "data": task_data(folder, cell.corpus, lengths[: number + 1])}
        for number, length in enumerate(lengths)
    ]
    return {
        "model": {
            **training.model,
            "family": "smollm3",
            # Without positions it can compare what is further apart than any two tokens of a trained text.
            "layers_without_positions": [training.model["num_layers"] - 1],
            # Copying is learned in a fraction of the steps where the output has a matrix of its own.
            "tie_embeddings": False,
        },
        "data": task_data(folder, cell.corpus, lengths),
        "training": {"sequence_length": training.tokens},
        "stages": [*first, *stages],
    }


def _language(cell: Cell, size: Size, folder: Path) -> Settings:
    training, length = size.language, size.code_lengths[cell.corpus]
    data, held_out = code_data(folder)
    return {
        "model": {**training.model, "tie_embeddings": False, "rotary_base": 5e5},
        "data": {**data, "cut_documents": length},
        "training": {
            "steps": training.steps,
            "sequence_length": length,
            "global_batch_size": max(1, training.tokens // length),
            "micro_batch_size": max(1, training.tokens // length),
        },
        "evaluation": {
            "interval": 1_000_000,
            "sequences": size.sequences,
            "buckets": [edge for edge in _EDGES if edge < length],
            "data": held_out,
        },
    }


def _optimizer(training: Training, steps: int) -> Settings:
    """Return the section `optimizer:` of stages of so many steps and more."""
    return {"lr": training.lr, "min_lr": training.lr / 10, "warmup_steps": min(_WARMUP, steps // 2)}
