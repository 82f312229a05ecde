"""Factors of the planner's times, and an offset of its memory, from measured runs.

Knows how runs are fitted; does not know what a prediction consists of beyond its parts.

The time of a run is taken as dense_factor x (matrix products, element-wise kernels, optimizer) + attention_factor x
attention + the rest as predicted. One run tells one factor, for both; several runs of different shares of attention tell
both, by least squares of the relative errors. What the allocator holds beside what is counted is the mean difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import GPUS, Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.measurements import Measurement, measure_run, read_measurements
from dash_dist.planning.prediction import Prediction, predict
from dash_dist.training.errors import ConfigError

GIB = 2**30
LEAST_ANGLE = 0.1
"""Of the runs' (dense, attention) parts of the time, in radians: with less between them, two factors are not told
apart."""


@dataclass(frozen=True)
class Calibration:
    """What runs said. runs: their names."""

    gpu: str
    runs: tuple[str, ...]
    dense_factor: float
    attention_factor: float
    memory_offset: float

    def apply(self, assumptions: Assumptions) -> Assumptions:
        return replace(
            assumptions,
            dense_factor=self.dense_factor,
            attention_factor=self.attention_factor,
            memory_offset=self.memory_offset,
        )

    def as_json(self) -> dict[str, Any]:
        return {"calibration": asdict(self)}


def calibrate(sources: Sequence[Path], *, gpu: str, gpus_per_node: int = 8) -> Calibration:
    """
    Args:
        sources: folders of runs, JSON files of measurements (`Measurement`), or one JSON file of a calibration.
        gpu: a key of GPUS, that the runs were on.

    Raises ConfigError for what cannot be read, and for a calibration of another GPU.
    """
    measurements: list[Measurement] = []
    for source in sources:
        if source.is_dir():
            measurements.append(measure_run(source))
            continue
        ready = _read_calibration(source)
        if ready is None:
            measurements += read_measurements(source)
            continue
        if len(sources) > 1:
            raise ConfigError(f"--calibrate {source} is a calibration: give it alone, or the runs it was made from")
        if ready.gpu != gpu:
            raise ConfigError(f"--calibrate {source} is of a {ready.gpu}: give --gpu {ready.gpu}, or runs on a {gpu}")
        return ready
    return fit(measurements, gpu=gpu, gpus_per_node=gpus_per_node)


def predict_measured(
    measurement: Measurement, assumptions: Assumptions, *, gpu: str, gpus_per_node: int = 8
) -> Prediction:
    """The prediction of a run that was measured, at the density that it had."""
    from dash_dist.planning.command import vocabulary_of

    config = measurement.run_config()
    kind = GPUS[gpu]
    machine = Machine(kind, measurement.gpus, min(gpus_per_node, measurement.gpus), kind.memory * GIB)
    if measurement.density is not None:
        assumptions = replace(assumptions, density=min(measurement.density, 1.0))
    try:
        layout = Layout.of(config, measurement.gpus)
    except ValueError as error:
        raise ConfigError(f"the measured run {measurement.name}: {error}") from None
    return predict(config, layout, machine, assumptions, vocab_size=vocabulary_of(config))


def fit(measurements: Sequence[Measurement], *, gpu: str, gpus_per_node: int = 8) -> Calibration:
    """Least squares over runs. Raises ConfigError where there is none."""
    if not measurements:
        raise ConfigError("--calibrate: there is no measured run in what was given")
    plain = Assumptions()
    parts, offsets = [], []
    for measurement in measurements:
        prediction = predict_measured(measurement, plain, gpu=gpu, gpus_per_node=gpus_per_node)
        time = prediction.time
        dense = time.matmul + time.elementwise + time.optimizer
        rest = time.total - dense - time.attention
        measured = measurement.step_seconds
        parts.append((dense / measured, time.attention / measured, (measured - rest) / measured))
        if measurement.allocated_gib is not None:
            offsets.append(measurement.allocated_gib * GIB - prediction.peak.allocated)
    dense_factor, attention_factor = _factors(parts)
    return Calibration(
        gpu=gpu,
        runs=tuple(measurement.name for measurement in measurements),
        dense_factor=dense_factor,
        attention_factor=attention_factor,
        memory_offset=sum(offsets) / len(offsets) if offsets else 0.0,
    )


def _factors(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(x, y) of dense x + attention y = wanted, by least squares; x = y where the runs do not tell them apart."""
    angles = [math.atan2(attention, dense) for dense, attention, _ in parts]
    if max(angles) - min(angles) > LEAST_ANGLE:
        dd, da, aa, dw, aw = (
            sum(x * y for x, y in pairs)
            for pairs in (
                [(d, d) for d, _, _ in parts],
                [(d, a) for d, a, _ in parts],
                [(a, a) for _, a, _ in parts],
                [(d, w) for d, _, w in parts],
                [(a, w) for _, a, w in parts],
            )
        )
        determinant = dd * aa - da * da
        factors = (dw * aa - aw * da) / determinant, (dd * aw - da * dw) / determinant
        if min(factors) > 0:
            return factors
    both = sum((d + a) * w for d, a, w in parts) / sum((d + a) ** 2 for d, a, _ in parts)
    return both, both


def _read_calibration(path: Path) -> Calibration | None:
    """None where the file is of something else. Raises ConfigError where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--calibrate {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--calibrate {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or "calibration" not in content:
        return None
    try:
        fields = content["calibration"]
        return Calibration(**{**fields, "runs": tuple(fields["runs"])})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"--calibrate {path} is not a calibration of this version: {error}") from None
