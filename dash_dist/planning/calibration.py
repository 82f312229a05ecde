"""Calibration of predictions by measured runs.

Knows how runs are fitted; does not know what a prediction consists of beyond its parts.

The time of a run is dense_factor x (matrix products, element-wise kernels, optimizer) + attention_factor x attention +
the rest as predicted. What is found depends on what the runs tell apart:

- One run, or several with equal shares of attention: one factor for both.
- Several runs on a GPU whose attention kernels were measured (`Gpu.measured`): dense_factor, and instead of a factor
  the independence of neighbouring tokens' selections (`independence`), a property of the model, not of the machine.
- Several runs on another GPU: both factors.

By least squares of the relative errors. The memory offset is the mean difference between allocated and counted bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dash_dist.errors import ConfigError
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import GPUS, Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.measurements import Measurement, measure_run, read_measurements
from dash_dist.planning.prediction import Prediction, predict

GIB = 2**30
LEAST_SHARE = 0.1
"""Runs whose shares of attention in the time differ by less do not tell it from the rest."""
_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """Calibration drawn from measured runs.

    Attributes:
        gpu: a key of GPUS.
        runs: their names.
        dense_factor, attention_factor: see the module.
        independence: see `Assumptions`; None where the runs do not tell it.
        memory_offset: bytes.
    """

    gpu: str
    runs: tuple[str, ...]
    dense_factor: float
    attention_factor: float
    independence: float | None
    memory_offset: float

    def apply(self, assumptions: Assumptions) -> Assumptions:
        return replace(
            assumptions,
            dense_factor=self.dense_factor,
            attention_factor=self.attention_factor,
            independence=assumptions.independence if self.independence is None else self.independence,
            memory_offset=self.memory_offset,
        )

    def as_json(self) -> dict[str, Any]:
        return {"calibration": asdict(self)}

    def __str__(self) -> str:
        routing = "" if self.independence is None else f", independence {self.independence:.2f}"
        return (
            f"calibrated on {', '.join(self.runs)} ({self.gpu}): attention x {self.attention_factor:.3f}, other "
            f"computation x {self.dense_factor:.3f}{routing}, memory {self.memory_offset / GIB:+.2f} GiB"
        )


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
    from dash_dist.planning.vocabulary import vocabulary_of

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

    def predictions(assumptions: Assumptions) -> list[Prediction]:
        return [predict_measured(one, assumptions, gpu=gpu, gpus_per_node=gpus_per_node) for one in measurements]

    seconds = [one.step_seconds for one in measurements]
    plain = Assumptions()
    expected = predictions(plain)
    shares = [one.time.attention / one.seconds for one in expected]
    independence: float | None = None
    if max(shares) - min(shares) < LEAST_SHARE:
        factor = _one_factor([(_dense(one) + one.time.attention, _rest(one)) for one in expected], seconds)[1]
        factors = factor, factor
    elif GPUS[gpu].measured:
        candidates = []
        for step in range(_STEPS + 1):
            tried = step / _STEPS
            parts = [
                (_dense(one), _rest(one) + one.time.attention)
                for one in predictions(replace(plain, independence=tried))
            ]
            candidates.append((*_one_factor(parts, seconds), tried))
        # The first of equals is the nearest to the default: runs with all chunks selected say nothing about it.
        _, factor, independence = min(candidates, key=lambda one: (one[0], abs(one[2] - plain.independence)))
        factors = factor, 1.0
    else:
        factors = _two_factors([(_dense(one), one.time.attention, _rest(one)) for one in expected], seconds)
    offsets = [
        measurement.allocated_gib * GIB - prediction.peak.allocated
        for measurement, prediction in zip(measurements, expected, strict=True)
        if measurement.allocated_gib is not None
    ]
    return Calibration(
        gpu=gpu,
        runs=tuple(measurement.name for measurement in measurements),
        dense_factor=factors[0],
        attention_factor=factors[1],
        independence=independence,
        memory_offset=sum(offsets) / len(offsets) if offsets else 0.0,
    )


def _dense(prediction: Prediction) -> float:
    time = prediction.time
    return time.matmul + time.elementwise + time.optimizer


def _rest(prediction: Prediction) -> float:
    return prediction.seconds - _dense(prediction) - prediction.time.attention


def _one_factor(parts: Sequence[tuple[float, float]], seconds: Sequence[float]) -> tuple[float, float]:
    """(sum of squared relative errors, x) of x part + rest = seconds."""
    relative = [(part / measured, 1 - rest / measured) for (part, rest), measured in zip(parts, seconds, strict=True)]
    factor = sum(part * wanted for part, wanted in relative) / sum(part * part for part, _ in relative)
    return sum((factor * part - wanted) ** 2 for part, wanted in relative), factor


def _two_factors(parts: Sequence[tuple[float, float, float]], seconds: Sequence[float]) -> tuple[float, float]:
    """(x, y) of x dense + y attention + rest = seconds; x = y where one of them would not be above 0."""
    relative = [
        (dense / measured, attention / measured, 1 - rest / measured)
        for (dense, attention, rest), measured in zip(parts, seconds, strict=True)
    ]
    dd, da, aa = (sum(one[i] * one[j] for one in relative) for i, j in ((0, 0), (0, 1), (1, 1)))
    dw, aw = (sum(one[i] * one[2] for one in relative) for i in (0, 1))
    determinant = dd * aa - da * da
    factors = (dw * aa - aw * da) / determinant, (dd * aw - da * dw) / determinant
    if min(factors) > 0:
        return factors
    both = _one_factor([(dense + attention, rest) for dense, attention, rest in parts], seconds)[1]
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
