"""Measurements of a run: step time, peak memory and density, from its folder or from a JSON file.

Knows the curves' names and the folder of a run. Does not know predictions.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dash_dist.config.file import load_config, to_yaml
from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError
from dash_dist.run.curves import read_curves

WARMUP_STEPS = 3
"""Steps at the beginning that compile kernels and fill the allocator: not counted."""


@dataclass(frozen=True)
class Measurement:
    """One run.

    Attributes:
        name: of the run.
        config: resolved, as YAML.
        gpus: processes.
        gpu: name of the device, or None if it was not recorded.
        steps: that step_seconds is the median of.
        step_seconds: of an optimizer step.
        allocated_gib: peak of torch's allocator over steps, of the fullest rank; None for a run on CPUs.
        reserved_gib: likewise, what the allocator held.
        density: mean over layers, of the last step whose routing was recorded; None where none was.
    """

    name: str
    config: str
    gpus: int
    gpu: str | None
    steps: int
    step_seconds: float
    allocated_gib: float | None
    reserved_gib: float | None
    density: float | None

    def run_config(self) -> RunConfig:
        """The configuration, parsed. Raises ConfigError where this version refuses it."""
        import yaml

        try:
            return RunConfig.model_validate(yaml.safe_load(self.config))
        except ValidationError as error:
            raise ConfigError(f"the configuration of the measured run {self.name} is refused: {error}") from None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_run(folder: Path, *, gpu: str | None = None) -> Measurement:
    """Read a run's config.yaml and its TensorBoard curves. Raises ConfigError where something is missing.

    The first steps are left out, and steps that recorded their routing, whose time differs. Of a run with stages the
    last one that was reached counts.
    """
    run = load_config(folder / "config.yaml")
    curves = read_curves(folder)
    seconds, routed = curves.get("perf/step_seconds", {}), curves.get("routing/density/layer_0", {})
    stage = run.stage_at(max(seconds, default=1) - 1)
    config, begin = stage.config, stage.first_step + WARMUP_STEPS
    counted = {step: value for step, value in seconds.items() if step > begin and step not in routed}
    if not counted:
        raise ConfigError(
            f"{folder} has no step time beyond step {begin} without recorded routing: run it for more steps "
            "with logging.interval=1 and a large logging.routing_interval"
        )
    step = max(counted)
    rate = curves["perf/tokens_per_second_per_gpu"][step]
    tokens = (1 - curves["data/padding"][step]) * config.training.tokens_per_step

    def peak(name: str) -> float | None:
        values = [value for at, value in curves.get(name, {}).items() if at in counted]
        return max(values) if values else None

    densities = [max(curve.items())[1] for tag, curve in curves.items() if tag.startswith("routing/density/")]
    return Measurement(
        name=config.run.name,
        config=to_yaml(config),
        gpus=round(tokens / (rate * counted[step])),
        gpu=gpu,
        steps=len(counted),
        step_seconds=statistics.median(counted.values()),
        allocated_gib=peak("memory/allocated_peak_gib"),
        reserved_gib=peak("memory/reserved_peak_gib"),
        density=statistics.fmean(densities) if densities else None,
    )


def read_measurements(path: Path) -> list[Measurement]:
    """From a JSON file with one measurement, a list of them, or {"measurements": [...]}. Raises ConfigError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content = content.get("measurements", [content])
        return [Measurement(**one) for one in content]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no measurements of runs: {error}") from None
