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

from dash_dist.config.attention import AttentionConfig, RoutingWarmup
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainablePattern, TrainableSection
from dash_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from dash_dist.megatron.parallel import ParallelDims
from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.common.imported import read_imported
from tools.benchmarks.conversion.table import as_markdown
from tools.benchmarks.conversion.texts import check_windows, code, questions
from tools.benchmarks.conversion.training import Curve, Setup, measure, train
from tools.benchmarks.conversion.ways import chosen, dense, unchanged, ways

_PROGRAM = "tools.benchmarks.conversion"
_SETTINGS = {"kind", "routing_scale", "prior_sigma", "attend_first_chunk", "top_chunks"}
"""Of attention, in the results of weights as they are."""
_ROUTING = TrainableSection(parameters=(TrainablePattern(match="*.summary_query"),))


def main(
    out: Annotated[Path, typer.Argument(help="File for the figures as JSON.")],
    weights: Annotated[
        Path | None, typer.Option(help="Folder that `dash-dist import` wrote, in place of the small model.")
    ] = None,
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
    attend_first_chunk: Annotated[bool, typer.Option(help="Set attention.attend_first_chunk.")] = False,
    lr: Annotated[float, typer.Option(help="Learning rate after the change.")] = 5e-4,
    way: Annotated[list[str] | None, typer.Option(help="Ways to measure, each with a --way. Default: all.")] = None,
    unchanged_scale: Annotated[
        list[float] | None, typer.Option(help="Measure the dense weights with this routing scale, without a step.")
    ] = None,
    unchanged_chunks: Annotated[
        list[int] | None, typer.Option(help="Likewise topk and infllmv2, with this number of chunks.")
    ] = None,
    question_length: Annotated[
        list[int] | None, typer.Option(help="Tokens of questions, at most those of a sequence.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions of each task and length.")] = 8,
    heldout: Annotated[int, typer.Option(min=1, help="Batches of held-out text.")] = 8,
    mebibytes: Annotated[float, typer.Option(help="Source code.")] = 32.0,
    rotary_base: Annotated[float | None, typer.Option(help="Rotary base of --weights; default: its own.")] = None,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Convert a dense model in several ways on the same batches, and write what was measured before and after each."""
    try:
        if out.suffix != ".json":
            raise ValueError(f"{out}: give a file that ends in .json; the tables are written beside it as .md")
        if weights is None and rotary_base is not None:
            raise ValueError("--rotary-base is that of --weights: give both")
        if warmup_steps >= steps:
            raise ValueError(f"--warmup-steps {warmup_steps} is not below --steps {steps}: the last scale would differ")
        if weights is None:
            model, tokenizer = _small(layers, hidden)
        else:
            model, tokenizer = _imported(weights, sequence_length, rotary_base)
        dash = AttentionConfig(
            chunk_size=chunk_size, routing_scale=routing_scale, attend_first_chunk=attend_first_chunk
        )
        check_combination(model, dash, ParallelConfig(), world_size=1, sequence_length=sequence_length)
        asked = chosen(ways(dash, RoutingWarmup(start=warmup_start, steps=warmup_steps), prior_sigma), way or [])
        plain = []
        if unchanged_scale or unchanged_chunks:
            plain = list(unchanged(dash, unchanged_scale or [], unchanged_chunks or [], prior_sigma))
        text = code(tokenizer, mebibytes)
        check_windows(text, sequence_length)
        longest = max(question_length or [0])
        if longest > sequence_length:
            raise ValueError(f"--question-length {longest} is above {sequence_length} of a sequence")
        samples_by_name = questions(tokenizer, question_length or [], samples)
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    dims = ParallelDims.initialise(ParallelConfig(), timeout=timedelta(seconds=600))
    record: dict[str, Any] = {
        "machine": describe_environment(_PROGRAM, sys.argv[1:], commit=commit, device=dims.device.type),
        "unchanged": [],
        "ways": {},
    }
    vocab_size = model.embedded_tokens(tokenizer.vocab_size)
    setup = Setup(dims, model, vocab_size, text, samples_by_name, sequence_length, batch_size, heldout)
    with tempfile.TemporaryDirectory() as folder:
        start = None
        if weights is None:
            start = Path(folder) / "dense"
            _keep(record, out, "dense training", train(setup, dense(dash), dense_steps, lr=2e-3, load=None, save=start))
        for attention in plain:
            found = measure(setup, attention, load=start)
            settings = attention.model_dump(mode="json", include=_SETTINGS)
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


def _small(layers: int, hidden: int) -> tuple[ModelConfig, Tokenizer]:
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=hidden // 32,
        num_kv_heads=hidden // 64,
    )
    return model, ByteTokenizer()


def _imported(weights: Path, length: int, rotary_base: float | None) -> tuple[ModelConfig, Tokenizer]:
    """Return the settings and the tokenizer of a folder that `dash-dist import` wrote.

    Args:
        rotary_base: of sequences up to `length` tokens; None: the folder's own, with its own limit.
    """
    section, tokenizer = read_imported(weights)
    if tokenizer is None:
        raise ValueError(f"{weights / 'model.yaml'} names no tokenizer: import a model with one")
    if rotary_base is not None:
        positions = section.get("positions", {})
        longest = max(length, positions.get("max_positions", 0))
        section |= {"rotary_base": rotary_base, "positions": positions | {"max_positions": longest}}
    return ModelConfig(**section), load_tokenizer(tokenizer)


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
