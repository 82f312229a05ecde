"""Compares ways to convert a small dense model, trained on the source code of installed packages, to DashAttention.

Knows the ways and what is measured; does not know ranks. It uses a GPU if there is one, and one process.
"""

from __future__ import annotations

import json
import site
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer

from dash_dist.config.attention import AttentionConfig, RoutingWarmup
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainablePattern, TrainableSection
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from tools.benchmarks.common.environment import describe_environment

_BYTES = 256
_TEXT_MIB = 32
_HELD_OUT = 8  # batches
_ROUTING = TrainableSection(parameters=(TrainablePattern(match="*.summary_query"),))


@dataclass(frozen=True)
class _Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


@dataclass(frozen=True)
class _Setup:
    """Everything that the ways share."""

    dims: ParallelDims
    parallel: ParallelConfig
    model: ModelConfig
    text: np.ndarray[Any, np.dtype[np.uint8]]
    sequence_length: int
    batch_size: int
    chunk_size: int
    checkpoint: Path


@dataclass
class Curve:
    """Measurements of one way, a number a step, and its loss on held-out text."""

    loss: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    local_loss: list[float] = field(default_factory=list)
    heldout_before: float = 0.0
    heldout_after: float = 0.0
    seconds: float = 0.0


def main(
    out: Annotated[Path, typer.Argument(help="File for the figures as JSON.")],
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    hidden: Annotated[int, typer.Option(help="Channels; a head has 32 of them.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Bytes of a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 16,
    dense_steps: Annotated[int, typer.Option(help="Steps of the dense model.")] = 400,
    steps: Annotated[int, typer.Option(help="Steps after the change.")] = 60,
    phase_steps: Annotated[int, typer.Option(help="Steps of the conversion phase.")] = 40,
    warmup_steps: Annotated[int, typer.Option(help="Steps of the routing warmup.")] = 30,
    warmup_start: Annotated[float, typer.Option(help="Routing scale of its first step.")] = 1.0,
    routing_scale: Annotated[float, typer.Option(help="Routing scale of the converted model.")] = 8.0,
) -> None:
    """Train a dense model, convert it in four ways on the same batches, and write a table and a JSON file."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=hidden // 32,
        num_kv_heads=hidden // 64,
    )
    parallel = ParallelConfig()
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=600))
    machine = describe_environment("tools.benchmarks.conversion", sys.argv[1:], commit=None, device=dims.device.type)
    with tempfile.TemporaryDirectory() as folder:
        setup = _Setup(dims, parallel, model, _text(), sequence_length, batch_size, chunk_size, Path(folder) / "dense")
        dash = AttentionConfig(chunk_size=chunk_size, routing_scale=routing_scale)
        warm = dash.model_copy(update={"routing_warmup": RoutingWarmup(start=warmup_start, steps=warmup_steps)})
        dense = AttentionConfig(chunk_size=chunk_size, kind="dense")
        phase = Path(folder) / "phase"
        curves = {"dense training": _train(setup, dense, dense_steps, lr=2e-3, load=None, save=setup.checkpoint)}
        curves["phase"] = _train(
            setup,
            dash.model_copy(update={"conversion": "output"}),
            phase_steps,
            lr=2e-2,
            load=setup.checkpoint,
            save=phase,
            trainable=_ROUTING,
        )
        ways = {
            "dense, continued": (dense, setup.checkpoint),
            "straight": (dash, setup.checkpoint),
            "warmup": (warm, setup.checkpoint),
            "phase, then straight": (dash, phase),
            "phase, then warmup": (warm, phase),
        }
        for name, (attention, start) in ways.items():
            curves[name] = _train(setup, attention, steps, lr=5e-4, load=start, save=None, seed=1)
            _print(name, curves[name])
            measured = {way: vars(curve) for way, curve in curves.items()}
            out.write_text(json.dumps({"machine": machine, "ways": measured}, indent=1) + "\n")
    dims.close()


def _train(
    setup: _Setup,
    attention: AttentionConfig,
    steps: int,
    *,
    lr: float,
    load: Path | None,
    save: Path | None,
    trainable: TrainableSection | None = None,
    seed: int = 0,
) -> Curve:
    """Train from a checkpoint, counting steps from 0, on the batches of `seed`."""
    curve = Curve()
    with _engine(setup, attention, steps, lr, trainable) as engine:
        if load is not None:
            engine.load(load)
            engine.step = 0
        curve.heldout_before = _heldout(engine, setup)
        began = time.perf_counter()
        batches = _batches(setup, seed)
        for _ in range(steps):
            engine.telemetry.record_routing = True
            result = engine.train_step([next(batches)])
            curve.loss.append(round(result.loss, 5))
            routed = [one.density for one in engine.telemetry.routing_statistics()] or [1.0]  # of dense layers
            curve.density.append(round(fmean(routed), 5))
            if "routing/conversion_loss" in result.curves:
                curve.local_loss.append(round(result.curves["routing/conversion_loss"], 5))
        curve.seconds = round(time.perf_counter() - began, 1)
        curve.heldout_after = _heldout(engine, setup)
        if save is not None:
            engine.start_save(save, background=False).finish()
    return curve


@contextmanager
def _engine(
    setup: _Setup, attention: AttentionConfig, steps: int, lr: float, trainable: TrainableSection | None
) -> Iterator[MegatronEngine]:
    yield MegatronEngine(
        setup.model,
        attention,
        setup.parallel,
        OptimizerConfig(lr=lr, min_lr=lr / 10, warmup_steps=min(10, steps - 1)),
        dims=setup.dims,
        vocab_size=_BYTES,
        sequence_length=setup.sequence_length,
        total_steps=steps,
        trainable=trainable,
    )


def _heldout(engine: MegatronEngine, setup: _Setup) -> float:
    batches = _batches(setup, seed=-1)
    found = [engine.evaluate([next(batches)], [setup.sequence_length])[0] for _ in range(_HELD_OUT)]
    return round(sum(one.total for one in found) / sum(one.tokens for one in found), 5)


def _batches(setup: _Setup, seed: int) -> Iterator[_Batch]:
    """Random sequences of the first nine tenths of the text; of the rest for `seed` -1."""
    border = len(setup.text) * 9 // 10
    low, high = (border, len(setup.text)) if seed < 0 else (0, border)
    generator = np.random.default_rng(abs(seed))
    length = setup.sequence_length
    while True:
        starts = generator.integers(low, high - length - 1, setup.batch_size)
        rows = torch.from_numpy(np.stack([setup.text[start : start + length + 1] for start in starts]).astype(np.int64))
        yield _Batch(
            rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(rows[:, 1:].shape, dtype=torch.bool)
        )


def _text() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Source code of the installed packages, file by file in the order of a fixed shuffle."""
    files = sorted(path for folder in site.getsitepackages() for path in Path(folder).rglob("*.py"))
    np.random.default_rng(0).shuffle(files)
    content, size = [], 0
    for path in files:
        content.append(path.read_bytes())
        size += len(content[-1])
        if size > _TEXT_MIB << 20:
            break
    return np.frombuffer(b"".join(content), dtype=np.uint8)


def _print(name: str, curve: Curve) -> None:
    first, last = fmean(curve.loss[:10]), fmean(curve.loss[-10:])
    print(
        f"{name:22} held-out {curve.heldout_before:.3f} -> {curve.heldout_after:.3f}   steps 1-10 {first:.3f}, last "
        f"{last:.3f}   density {curve.density[0]:.2f} -> {curve.density[-1]:.2f}   {curve.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
