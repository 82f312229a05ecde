"""One run: its configuration, loop, metrics and checkpoints.

Knows what a run consists of; does not know how its processes were started.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dash_dist.training.config import RunConfig
from dash_dist.training.config_file import load_config
from dash_dist.training.errors import CheckpointError, ConfigError, RunError
from dash_dist.training.progress import ConsoleProgress, ProgressReporter, RunStart, RunSummary, StepReport
from dash_dist.training.requests import Asked, Request

if TYPE_CHECKING:
    from dash_dist.training.run import train

__all__ = [
    "Asked",
    "CheckpointError",
    "ConfigError",
    "ConsoleProgress",
    "ProgressReporter",
    "Request",
    "RunConfig",
    "RunError",
    "RunStart",
    "RunSummary",
    "StepReport",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports Megatron-core only when something is trained: a configuration is checked without it."""
    if name == "train":
        return importlib.import_module("dash_dist.training.run").train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
