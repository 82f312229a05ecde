"""`dash-dist plan`: from options to predictions, to a report or JSON.

Knows the command's options and how a refused one is named; does not know how a prediction is made.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.calibration import Calibration, calibrate
from dash_dist.planning.hardware import GPUS, Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.prediction import Prediction, predict
from dash_dist.planning.report import as_json, as_text
from dash_dist.planning.search import best_layouts
from dash_dist.planning.vocabulary import vocabulary_of

GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Options of the command line. Raises ConfigError that names an impossible option."""

    gpus: int
    gpu: str = "H100"
    gpu_memory: float | None = None
    gpus_per_node: int = 8
    density: float = 0.1
    independence: float | None = None
    coverage: float | None = None
    document_length: float | None = None
    vocab_size: int | None = None
    calibrate: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.gpu.upper() not in GPUS:
            raise ConfigError(f"--gpu {self.gpu}: give one of {', '.join(GPUS)}")
        for name in ("gpus", "gpus_per_node", "gpu_memory", "document_length", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0")
        for name in ("density", "coverage"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"--{name} {value}: is a share of the chunks, above 0 and at most 1")
        if self.independence is not None and not 0 <= self.independence <= 1:
            raise ConfigError(f"--independence {self.independence}: give 0 (correlated) to 1 (independent)")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ConfigError(
                f"--gpus {self.gpus} is not a multiple of --gpus-per-node {self.gpus_per_node}: "
                "give whole nodes, or the number of GPUs of a node"
            )

    def machine(self) -> Machine:
        gpu = GPUS[self.gpu.upper()]
        memory = self.gpu_memory or gpu.memory
        return Machine(gpu, self.gpus, min(self.gpus_per_node, self.gpus), memory * GIB)

    def assumptions(self, calibration: Calibration | None) -> Assumptions:
        """Return the assumptions; given options take precedence over the calibration."""
        found = Assumptions(density=self.density, coverage=self.coverage, document_length=self.document_length)
        if calibration is not None:
            found = calibration.apply(found)
        return found if self.independence is None else replace(found, independence=self.independence)


def run_plan(path: Path, overrides: list[str], options: Options, *, json_path: Path | None) -> None:
    """Print the plan of the configuration at `path`, stage by stage, and write it as JSON where asked.

    Raises ConfigError.
    """
    config = load_config(path, overrides)
    calibration = None
    if options.calibrate:
        calibration = calibrate(options.calibrate, gpu=options.gpu.upper(), gpus_per_node=options.gpus_per_node)
    plans: dict[str, dict[str, Any]] = {}
    for stage in config.stage_list:
        if stage.name:
            sys.stdout.write(f"Stage {stage.name}, steps {stage.first_step + 1} to {stage.last_step}\n\n")
        text, plans[stage.name] = _plan(stage.config, options, calibration)
        sys.stdout.write(text)
    if json_path is not None:
        content = {"stages": plans} if config.stages else plans[""]
        try:
            json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {json_path}: {error.strerror}") from None


def _plan(config: RunConfig, options: Options, calibration: Calibration | None) -> tuple[str, dict[str, Any]]:
    """Return the plan of one stage as a report and as JSON."""
    machine, assumptions = options.machine(), options.assumptions(calibration)
    if config.parallel.fp8_linears and not machine.gpu.fp8:
        raise ConfigError(
            f"parallel.fp8_linears needs matrix units for FP8, and an {machine.gpu.name} has none: set "
            f"parallel.fp8_linears=false, or --gpu to one of {', '.join(gpu.name for gpu in GPUS.values() if gpu.fp8)}"
        )
    vocab_size = options.vocab_size or vocabulary_of(config)
    asked: Prediction | None = None
    refusal = None
    try:
        asked = predict(config, Layout.of(config, options.gpus), machine, assumptions, vocab_size=vocab_size)
    except ValueError as error:
        refusal = str(error)
    best, looked_at = best_layouts(config, machine, assumptions, vocab_size=vocab_size)
    text = as_text(
        config,
        machine,
        assumptions,
        asked,
        refusal,
        best,
        looked_at,
        vocab_size=vocab_size,
        calibration=calibration,
    )
    content = as_json(machine, assumptions, asked, refusal, best, looked_at, vocab_size=vocab_size)
    return text, content if calibration is None else content | calibration.as_json()
