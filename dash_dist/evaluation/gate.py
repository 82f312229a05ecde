"""Retrieval measured in the middle of a run, with the run's own engine.

Knows the suite `retrieval`; does not know what the run does with the result.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from dash_dist.data.tokenizer import Tokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.protocol import Predictor
from dash_dist.engine.ranks import Dims
from dash_dist.evaluation.groups import Bench
from dash_dist.evaluation.suites import SUITES


def evaluate_retrieval(
    engine: Predictor,
    tokenizer: Tokenizer,
    dims: Dims,
    control: ControlGroup,
    *,
    sequence_length: int,
    samples: int = 8,
    special_tokens: bool = False,
    seed: int = 0,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean accuracy over the tasks of the suite `retrieval`. A collective: all ranks call it.

    Weights, optimizer and step stay as they are, and the measurements of the last step are dropped.

    Args:
        sequence_length: that of the engine; samples fill it.
        samples: of each task.
        special_tokens: the run's `data.special_tokens`.
        beat: called after every forward pass.

    Raises:
        ConfigError: at every rank: the sequences are too short for a task, or the tokenizer cannot write its answers.
        ExchangeError: see `Predictor.next_tokens`.
    """
    start = tokenizer.special_tokens[0] if special_tokens else ()
    bench = Bench(engine, tokenizer, control, batch=dims.dp_size * dims.pp_size, start=start, seed=seed, beat=beat)
    groups = [
        bench.group(task, length=sequence_length, sequence_length=sequence_length, samples=samples, routing_scale=None)
        for task in SUITES["retrieval"]
    ]
    return fmean(group.accuracy for group in groups)
