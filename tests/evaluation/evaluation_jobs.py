"""Jobs of the ranks of the tests of the command `evaluate`.

The test process itself does not import this: it would load Megatron-core.
"""

import io
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console

from dash_dist.checkpoints.commands import export
from dash_dist.config.file import load_config
from dash_dist.data.tokenizer import ByteTokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.protocol import Predictor
from dash_dist.errors import ConfigError
from dash_dist.evaluation import groups as groups_module
from dash_dist.evaluation.command import evaluate
from dash_dist.evaluation.gate import evaluate_retrieval
from dash_dist.evaluation.options import Options
from dash_dist.evaluation.samples import make_sample
from dash_dist.hf import load
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.training.engines import build_engine
from tests.support.attempts import attempt


def train(config: Path, runs: list[list[str]]) -> list[str]:
    """Train runs one after the other; returns their errors."""
    return [attempt(config, *overrides).error for overrides in runs]


def evaluations(run: Path, commands: list[tuple[list[str], dict[str, Any]]]) -> list[tuple[list[Any], str]]:
    """Groups, and the output or the error, of each command of overrides and options."""
    return [_evaluation(run, overrides, options) for overrides, options in commands]


def _evaluation(run: Path, overrides: list[str], options: dict[str, Any]) -> tuple[list[Any], str]:
    out = io.StringIO()
    try:
        groups = evaluate(run, overrides, Options(**options), Console(file=out, width=200, highlight=False))
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"
    return groups, out.getvalue()


def failing_at_rank_1(run: Path, options: dict[str, Any]) -> str:
    """The error where rank 1 cannot make a sample."""
    real = make_sample

    def make(*arguments: Any, **named: Any) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("no sample here")
        return real(*arguments, **named)

    with mock.patch.object(groups_module, "make_sample", make):
        return _evaluation(run, [], options)[1]


def in_transformers(checkpoint: Path, out: Path, length: int, count: int) -> list[str]:
    """Greedy continuations of the samples of `single` by the exported model, in text."""
    export(checkpoint, out, progress=lambda _: None)
    model = load(out)
    given = []
    for index in range(count):
        sample = make_sample("single", ByteTokenizer(), length=length, index=index, seed=0)
        prompt = torch.from_numpy(sample.prompt)[None]
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(sample.answer),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        given.append(ByteTokenizer().decode(tokens[0, prompt.shape[1] :]))
    return given


def gates(config: Path) -> tuple[float, str]:
    """The accuracy by a run's own engine with random weights, and the error for sequences that are too short."""
    run = load_config(config, ["parallel.context=2", "run.name=gate"])
    dims = ParallelDims.initialise(run.parallel, timeout=run.training.distributed_timeout)
    try:
        control = ControlGroup(run.training.distributed_timeout)
        tokenizer = ByteTokenizer()
        engine: Predictor = build_engine(run, dims, tokenizer.vocab_size)
        arguments = {"sequence_length": run.training.sequence_length, "samples": 1}
        accuracy = evaluate_retrieval(engine, tokenizer, dims, control, **arguments)
        try:
            evaluate_retrieval(engine, tokenizer, dims, control, sequence_length=64)
        except ConfigError as error:
            return accuracy, str(error)
        return accuracy, "no error"
    finally:
        dims.close()
