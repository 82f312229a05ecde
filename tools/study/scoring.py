"""Accuracy of a trained model on texts of a task, at any length and setting of its attention.

Knows checkpoints and questions; does not know which lengths and settings are asked for. All questions of a text are
answered in one forward pass, each with the right answers before it in the text.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from dash_dist.config.file import load_config
from dash_dist.data.tokenizer import ByteTokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.distributed.process_group import joined_process_group
from dash_dist.engine.protocol import MOST_POSITIONS
from dash_dist.evaluation.loading import CONFIG, RunFolder, load_as_saved, load_predictor, read_state, verify
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.predictor import MegatronPredictor
from tools.study.probe import LayerProbe, Probe
from tools.study.sizes import Settings
from tools.study.text import Text

_TOKENIZER = ByteTokenizer()


@dataclass(frozen=True)
class Score:
    """A model's answers to the questions of some texts.

    Attributes:
        correct, asked: questions by difficulty.
        density: of the layers that select chunks, mean; 1 if none does.
        seconds: of a text's forward pass, median.
        layers: `LayerProbe` of each layer, mean over the probed texts.
    """

    correct: dict[str, int]
    asked: dict[str, int]
    density: float
    seconds: float
    layers: list[dict[str, float]]


class Scorer:
    """The newest checkpoint of a run, with any settings of its attention."""

    def __init__(self, run: Path, control: ControlGroup, dims: ParallelDims) -> None:
        self._path, self._control, self._dims = run / CONFIG, control, dims
        self._checkpoint, _ = RunFolder.of(run, step=None).find_checkpoint()
        self._state = read_state(self._checkpoint)
        verify(self._checkpoint, control)
        self._loaded: tuple[Settings, MegatronPredictor] | None = None

    def score(self, texts: Sequence[Text], attention: Settings, *, probed: int) -> Score:
        """Answer the questions of texts of one length.

        Args:
            attention: settings of the section that replace those of the training.
            probed: texts on which the attention is probed, which takes longer than the answers.
        """
        length = len(texts[0].text) + 1
        predictor = self._predictor(attention, length)
        predictor.set_sequence_length(length)
        correct: dict[str, int] = {}
        asked: dict[str, int] = {}
        seconds, densities, probes = list[float](), list[float](), list[list[LayerProbe]]()
        for number, text in enumerate(texts):
            found, taken, density = _answers(predictor, text)
            seconds.append(taken)
            densities.append(density)
            if number < probed:
                probes.append(_probe(predictor, text))
            for question, answer in zip(text.questions, found, strict=True):
                name = str(question.difficulty)
                asked[name] = asked.get(name, 0) + 1
                correct[name] = correct.get(name, 0) + (answer == ord(question.answer))
        return Score(correct, asked, fmean(densities), median(seconds), _mean(probes))

    def _predictor(self, attention: Settings, length: int) -> MegatronPredictor:
        if self._loaded is None or self._loaded[0] != attention:
            self._loaded = None  # its memory goes before the next one takes its own
            overrides = [f"attention.{name}={json.dumps(value)}" for name, value in attention.items()]
            config = load_as_saved(self._path, self._state, overrides)
            predictor, _ = load_predictor(
                config,
                self._checkpoint,
                self._dims,
                self._control,
                vocab_size=config.model.embedded_tokens(_TOKENIZER.vocab_size),
                sequence_length=length,
            )
            self._loaded = attention, predictor
        return self._loaded[1]


@contextlib.contextmanager
def scorer(run: Path) -> Iterator[Scorer]:
    """Give the scorer of a run's newest checkpoint, in this process alone.

    Raises:
        ConfigError, CheckpointError: the run cannot be loaded.
    """
    config = load_config(run / CONFIG)
    timeout = config.training.distributed_timeout
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(joined_process_group(timeout=timeout))
        dims = ParallelDims.initialise(config.parallel, timeout=timeout)
        cleanup.callback(dims.close)
        yield Scorer(run, ControlGroup(timeout), dims)


def _answers(predictor: MegatronPredictor, text: Text) -> tuple[list[int], float, float]:
    """Return the likeliest token at each question's answer, the seconds of the first pass, and the density."""
    rows, places = _row(text), [question.place - 1 for question in text.questions]
    found, seconds, density = list[int](), 0.0, 1.0
    for begin in range(0, len(places), MOST_POSITIONS):
        predictor.telemetry.record_routing = begin == 0
        started = time.perf_counter()
        positions = torch.tensor([places[begin : begin + MOST_POSITIONS]])
        found += predictor.next_tokens(rows, positions)[0].tolist()  # on the CPU: it waits for the device
        if begin == 0:
            seconds = time.perf_counter() - started
            layers = predictor.telemetry.routing_statistics()
            density = fmean(layer.density for layer in layers) if layers else 1.0
    predictor.telemetry.record_routing = False
    return found, seconds, density


def _probe(predictor: MegatronPredictor, text: Text) -> list[LayerProbe]:
    asked = text.questions[:MOST_POSITIONS]
    probe = Probe([question.place - 1 for question in asked], [question.evidence for question in asked])
    with probe.watching():
        predictor.next_tokens(_row(text), torch.tensor([[len(text.text) - 1]]))
    return probe.layers


def _row(text: Text) -> torch.Tensor:
    (tokens,) = _TOKENIZER.encode_batch([text.text])
    return torch.from_numpy(np.append(tokens.astype(np.int64), _TOKENIZER.end_of_document)).unsqueeze(0)


def _mean(probes: Sequence[Sequence[LayerProbe]]) -> list[dict[str, float]]:
    by_layer = zip(*probes, strict=True)
    return [{name: fmean(getattr(one, name) for one in layer) for name in asdict(layer[0])} for layer in by_layer]
