"""Compares ways to convert a dense model to DashAttention on source code: a small one trained here, or a given one.

    python -m tools.benchmarks.conversion OUT.json
    python -m tools.benchmarks.conversion OUT.json --weights IMPORTED --sequence-length 2048 --chunk-size 64

Knows the order of the runs; does not know what is measured. It uses a GPU if there is one, and one process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
import yaml

from dash_dist.config.attention import AttentionConfig, RoutingWarmup
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainablePattern, TrainableSection
from dash_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from dash_dist.megatron.parallel import ParallelDims
from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.conversion.table import as_markdown
from tools.benchmarks.conversion.texts import code, questions
from tools.benchmarks.conversion.training import Curve, Setup, measure, train
from tools.benchmarks.conversion.ways import chosen, unchanged, ways

_PROGRAM = "tools.benchmarks.conversion"
_ROUTING = TrainableSection(parameters=(TrainablePattern(match="*.summary_query"),))


def main(
    out: Annotated[Path, typer.Argument(help="File for the figures as JSON.")],
    weights: Annotated[Path | None, typer.Option(help="Folder that `dash-dist import` wrote: that model.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the small model.")] = 4,
    hidden: Annotated[int, typer.Option(help="Its channels; a head has 32 of them.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence: bytes for the small model.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 16,
    dense_steps: Annotated[int, typer.Option(help="Steps of the small model before the change.")] = 400,
    steps: Annotated[int, typer.Option(help="Steps after the change.")] = 60,
    phase_steps: Annotated[int, typer.Option(help="Steps of the conversion phase.")] = 40,
    warmup_steps: Annotated[int, typer.Option(help="Steps of the routing warmup.")] = 30,
    warmup_start: Annotated[float, typer.Option(help="Routing scale of its first step.")] = 1.0,
    routing_scale: Annotated[float, typer.Option(help="Routing scale of the converted model.")] = 8.0,
    prior_sigma: Annotated[float, typer.Option(help="Of the ways with one, beside a very large one.")] = 4.0,
    lr: Annotated[float, typer.Option(help="Learning rate after the change.")] = 5e-4,
    way: Annotated[list[str] | None, typer.Option(help="Ways to measure, each with a --way. Default: all.")] = None,
    unchanged_scale: Annotated[
        list[float] | None, typer.Option(help="Measure --weights with this routing scale, without a step.")
    ] = None,
    question_length: Annotated[
        list[int] | None, typer.Option(help="Tokens of questions, at most those of a sequence; with --weights.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Questions of each task and length.")] = 8,
    heldout: Annotated[int, typer.Option(help="Batches of held-out text.")] = 8,
    mebibytes: Annotated[float, typer.Option(help="Source code.")] = 32.0,
    rotary_base: Annotated[float | None, typer.Option(help="Rotary base of --weights; default: its own.")] = None,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Convert a dense model in several ways on the same batches, and write what was measured after each."""
    dash = AttentionConfig(chunk_size=chunk_size, routing_scale=routing_scale)
    asked = ways(dash, RoutingWarmup(start=warmup_start, steps=warmup_steps), prior_sigma)
    try:
        asked = chosen(asked, way or [])
        if max(question_length or [0]) > sequence_length:
            raise ValueError(
                f"--question-length {max(question_length or [0])} is above {sequence_length} of a sequence"
            )
        model, tokenizer, vocab_size = _model(weights, layers, hidden, sequence_length, rotary_base)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    parallel = ParallelConfig()
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=600))
    record: dict[str, Any] = {
        "machine": describe_environment(_PROGRAM, sys.argv[1:], commit=commit, device=dims.device.type),
        "unchanged": [],
        "ways": {},
    }
    setup = Setup(
        dims,
        parallel,
        model,
        vocab_size,
        code(tokenizer, mebibytes),
        questions(tokenizer, question_length or [], samples),
        sequence_length,
        batch_size,
        heldout,
    )
    with tempfile.TemporaryDirectory() as folder:
        start = None
        if weights is None:
            start = Path(folder) / "dense"
            dense = AttentionConfig(chunk_size=chunk_size, kind="dense")
            _keep(record, out, "dense training", train(setup, dense, dense_steps, lr=2e-3, load=None, save=start))
        for attention in unchanged(dash, unchanged_scale, prior_sigma) if unchanged_scale else ():
            found = measure(setup, attention)
            settings = attention.model_dump(mode="json", include={"kind", "routing_scale", "prior_sigma"})
            record["unchanged"].append(settings | asdict(found))
            print(settings, found, flush=True)
            _write(record, out)
        phase = Path(folder) / "phase"
        if any(one.after_phase for one in asked.values()):
            learning = dash.model_copy(update={"conversion": "output"})
            trained = train(setup, learning, phase_steps, lr=2e-2, load=start, save=phase, trainable=_ROUTING)
            _keep(record, out, "phase", trained)
        for name, one in asked.items():
            begin = phase if one.after_phase else start
            trained = train(setup, one.attention, steps, lr=lr, load=begin, save=None, trainable=one.trainable, seed=1)
            _keep(record, out, name, trained)
    dims.close()


def _model(
    weights: Path | None, layers: int, hidden: int, length: int, rotary_base: float | None
) -> tuple[ModelConfig, Tokenizer, int]:
    """Return the model's settings, its tokenizer and the tokens of its vocabulary."""
    if weights is None:
        model = ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=3 * hidden,
            num_attention_heads=hidden // 32,
            num_kv_heads=hidden // 64,
        )
        return model, ByteTokenizer(), ByteTokenizer.vocab_size
    described = yaml.safe_load((weights / "model.yaml").read_text())
    section = described["model"]
    if rotary_base is not None:
        section["rotary_base"] = rotary_base
        section["positions"] = section.get("positions", {}) | {"max_positions": length}
    return ModelConfig(**section), load_tokenizer(described["data"]["tokenizer"]), section["vocab_size"]


def _keep(record: dict[str, Any], out: Path, name: str, curve: Curve) -> None:
    record["ways"][name] = asdict(curve)
    _write(record, out)
    first, last = fmean(curve.loss[:10]), fmean(curve.loss[-10:])
    print(
        f"{name:24} held-out {curve.before.heldout:.3f} -> {curve.after.heldout:.3f}   steps 1-10 {first:.3f}, last "
        f"{last:.3f}   density {curve.density[0]:.2f} -> {curve.density[-1]:.2f}   {curve.seconds:.0f} s",
        flush=True,
    )


def _write(record: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(record))


if __name__ == "__main__":
    typer.run(main)
