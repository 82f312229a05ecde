"""The model of one way: trained on batches of code, its losses, densities and answers measured.

Knows the engine and its batches; does not know which ways there are. It takes one process.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.data.stream import Batch
from dash_dist.evaluation.samples import Sample
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from tools.benchmarks.conversion.texts import HELD_OUT, windows

_BUCKETS = 4  # equal parts of a sequence whose losses are given


@dataclass(frozen=True)
class Setup:
    """Everything that the ways share.

    Attributes:
        text: tokens of code.
        questions: samples by task and length, at most `sequence_length`; may be empty.
        heldout: batches of held-out text.
    """

    dims: ParallelDims
    model: ModelConfig
    vocab_size: int
    text: np.ndarray[Any, np.dtype[np.int32]]
    questions: Mapping[str, Sequence[Sample]]
    sequence_length: int
    batch_size: int
    heldout: int


@dataclass
class Measured:
    """A model at one point.

    Attributes:
        heldout: loss on held-out text, nats per token.
        by_position: likewise, for the equal parts of a sequence.
        density: on a held-out sequence, mean over layers that route; 1 without one.
        right: share of the questions whose greedy answer is the right one, by task and length.
    """

    heldout: float
    by_position: list[float]
    density: float
    right: dict[str, float]


@dataclass
class Curve:
    """Measurements of one way, and a number a step."""

    before: Measured
    after: Measured
    loss: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    local_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    setup: Setup,
    attention: AttentionConfig,
    steps: int,
    *,
    lr: float,
    load: Path | None,
    save: Path | None,
    trainable: TrainableSection | None = None,
    seed: int = 0,
) -> Curve:
    """Train from a checkpoint, or from the model's own start, counting steps from 0, on the batches of `seed`."""
    engine = _engine(setup, attention, steps, lr, trainable, load)
    routes = attention.conversion is None
    before = _measure(engine, setup, routes=routes)
    curve = Curve(before, before)
    began = time.perf_counter()
    batches = _batches(setup, seed)
    for step in range(1, steps + 1):
        engine.telemetry.record_routing = True
        result = engine.train_step([next(batches)])
        curve.loss.append(round(result.loss, 5))
        curve.density.append(_density(engine))
        if "routing/conversion_loss" in result.curves:
            curve.local_loss.append(round(result.curves["routing/conversion_loss"], 5))
        print(f"  step {step}: loss {result.loss:.4f}, density {curve.density[-1]:.3f}", flush=True)
    curve.seconds = round(time.perf_counter() - began, 1)
    engine.telemetry.record_routing = False
    curve.after = _measure(engine, setup, routes=routes)
    if save is not None:
        engine.start_save(save, background=False).finish()
    return curve


def measure(setup: Setup, attention: AttentionConfig, *, load: Path | None) -> Measured:
    """Measure a checkpoint, or the model's own start, with some attention, without a step."""
    return _measure(_engine(setup, attention, 1, 1.0, None, load), setup, routes=True)


def _engine(
    setup: Setup,
    attention: AttentionConfig,
    steps: int,
    lr: float,
    trainable: TrainableSection | None,
    load: Path | None,
) -> MegatronEngine:
    gc.collect()  # the engine before it holds itself in cycles
    engine = MegatronEngine(
        setup.model,
        attention,
        ParallelConfig(),
        OptimizerConfig(lr=lr, min_lr=lr / 10, warmup_steps=min(10, steps - 1)),
        dims=setup.dims,
        vocab_size=setup.vocab_size,
        sequence_length=setup.sequence_length,
        total_steps=steps,
        trainable=trainable,
    )
    if load is not None:
        engine.load(load)
        engine.step = 0
    return engine


def _measure(engine: MegatronEngine, setup: Setup, *, routes: bool) -> Measured:
    batches = _batches(setup, HELD_OUT)
    length = setup.sequence_length
    edges = [length * part // _BUCKETS for part in range(1, _BUCKETS + 1)]
    kept = [next(batches) for _ in range(setup.heldout)]
    buckets = [engine.evaluate([batch], edges) for batch in kept]
    parts = [_mean_loss(of_part) for of_part in zip(*buckets, strict=True)]
    total = _mean_loss([bucket for of_batch in buckets for bucket in of_batch])
    density = 1.0  # of a conversion phase, whose layers give their dense output
    if routes:
        engine.telemetry.record_routing = True
        engine.next_tokens(kept[0].tokens[:1], torch.tensor([[length - 1]]))
        density = _density(engine)
        engine.telemetry.record_routing = False
    right = {name: fmean(_is_right(engine, length, one) for one in of) for name, of in setup.questions.items()}
    return Measured(total, parts, density, right)


def _mean_loss(buckets: Sequence[Any]) -> float:
    return round(sum(one.total for one in buckets) / sum(one.tokens for one in buckets), 5)


def _density(engine: MegatronEngine) -> float:
    routed = [one.density for one in engine.telemetry.routing_statistics()] or [1.0]  # of dense layers
    return round(fmean(routed), 5)


def _is_right(engine: MegatronEngine, length: int, sample: Sample) -> bool:
    """Return whether each token of the answer is the likeliest one after those before it: greedy decoding gives it."""
    row = torch.zeros(1, length, dtype=torch.int64)  # what follows the answer changes nothing before it
    row[0, : sample.length] = torch.from_numpy(np.concatenate([sample.prompt, sample.answer]))
    positions = torch.arange(len(sample.prompt) - 1, sample.length - 1)[None]
    found = engine.next_tokens(row, positions)
    return bool((found[0] == torch.from_numpy(sample.answer)).all())


def _batches(setup: Setup, seed: int) -> Iterator[Batch]:
    for rows in windows(setup.text, seed=seed, batch_size=setup.batch_size, length=setup.sequence_length):
        labels = rows[:, 1:].contiguous()
        everything = torch.ones(labels.shape, dtype=torch.bool)
        yield Batch(rows[:, :-1].contiguous(), labels, everything, cu_seqlens=None)
