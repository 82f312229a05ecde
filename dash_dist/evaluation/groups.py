"""One task at one length and routing scale: its samples decoded and scored.

Knows samples, decoding and scores; does not know which groups there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from dash_dist.data.tokenizer import Tokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.protocol import Predictor
from dash_dist.errors import ConfigError
from dash_dist.evaluation.decoding import continue_greedily
from dash_dist.evaluation.samples import Sample, make_sample
from dash_dist.evaluation.scores import found_parts

DEPTH_BINS = 5
"""Equal parts of the text in which accuracy is given by depth."""


@dataclass(frozen=True)
class Scored:
    """One sample with its greedy continuation.

    Attributes:
        index, expected, depths: see `Sample`.
        given: text of the continuation, as many tokens as the right answer has.
        found: which of `expected` it has.
    """

    index: int
    expected: tuple[str, ...]
    depths: tuple[float, ...]
    given: str
    found: tuple[bool, ...]

    @property
    def score(self) -> float:
        """Share of the expected parts that the continuation has."""
        return fmean(self.found)


@dataclass(frozen=True)
class Group:
    """Samples of one task, length and routing scale.

    Attributes:
        routing_scale: None for dense attention.
        density: selected / causally available chunks, mean over the layers that route and the samples; 1 if none does.
        seconds: for making, decoding and scoring the samples.
        passes: forward passes over the samples' batches.
    """

    task: str
    length: int
    routing_scale: float | None
    density: float
    seconds: float
    passes: int
    samples: tuple[Scored, ...]

    @property
    def accuracy(self) -> float:
        """Mean score of the samples."""
        return fmean(one.score for one in self.samples)


def accuracy_by_depth(samples: Iterable[Scored]) -> dict[int, float]:
    """Return the share of the expected parts that were found, by the part of the text that they are in.

    Keys are parts from 0 to `DEPTH_BINS` - 1; those without an expected part are left out.
    """
    by_bin: dict[int, list[bool]] = {}
    for one in samples:
        for depth, found in zip(one.depths, one.found, strict=False):
            by_bin.setdefault(int(depth * DEPTH_BINS), []).append(found)
    return {number: fmean(by_bin[number]) for number in sorted(by_bin)}


@dataclass(frozen=True)
class Bench:
    """Everything that evaluates samples. Its method is a collective: all ranks call it.

    Attributes:
        batch: samples per forward call; all but those of the last pipeline round count in the density.
        start: tokens before every document.
        seed: of the samples.
        beat: called after every forward pass.
    """

    predictor: Predictor
    tokenizer: Tokenizer
    control: ControlGroup
    batch: int
    start: Sequence[int] = ()
    seed: int = 0
    beat: Callable[[], None] = lambda: None

    def group(
        self, task: str, *, length: int, sequence_length: int, samples: int, routing_scale: float | None
    ) -> Group:
        """Evaluate the first samples of a task.

        Args:
            length: tokens of a sample.
            sequence_length: that of the predictor, at least `length`.
            routing_scale: the predictor's, for the record.

        Raises:
            ConfigError: at every rank: the samples cannot be made at some rank.
            ExchangeError: see `Predictor.next_tokens`.
        """
        started = time.perf_counter()
        scored: list[Scored] = []
        densities: list[float] = []
        passes = 0
        for first in range(0, samples, self.batch):
            with self.control.together("the samples cannot be made", ConfigError):
                made = [
                    make_sample(task, self.tokenizer, length=length, index=index, seed=self.seed, start=self.start)
                    for index in range(first, min(first + self.batch, samples))
                ]
            found, density, more = self._decode(made, sequence_length)
            scored += found
            densities += [density] * len(made)
            passes += more
        seconds = time.perf_counter() - started
        return Group(task, length, routing_scale, fmean(densities), seconds, passes, tuple(scored))

    def _decode(self, made: Sequence[Sample], sequence_length: int) -> tuple[list[Scored], float, int]:
        telemetry = self.predictor.telemetry
        before, telemetry.record_routing = telemetry.record_routing, True
        density = 1.0

        def measure(passes: int) -> None:
            nonlocal density
            self.beat()
            if passes == 1:
                layers = telemetry.routing_statistics()
                density = fmean(layer.density for layer in layers) if layers else 1.0
                telemetry.record_routing = False

        try:
            continued = continue_greedily(
                self.predictor,
                [one.prompt for one in made],
                [one.answer for one in made],
                sequence_length=sequence_length,
                padding=self.tokenizer.end_of_document,
                after_pass=measure,
            )
        finally:
            telemetry.record_routing = before
        scored = []
        for one, tokens in zip(made, continued.tokens, strict=True):
            given = self.tokenizer.decode(tokens)
            scored.append(Scored(one.index, one.expected, one.depths, given, found_parts(one.expected, given)))
        return scored, density, continued.passes
