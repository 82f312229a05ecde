"""Training of a small model, and the inputs of its attention in the last step.

Knows the training loop and the module of the attention; does not know what is measured on its inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.modules.module import register_module_forward_pre_hook

from dash_dist.config.file import load_config
from dash_dist.context_parallel import DashAttention
from dash_dist.training.run import train
from dash_kernels import AttentionSpec
from tools.benchmarks.common.inputs import Inputs


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its training.

    Attributes:
        short: tokens of the sequences that it learns the language from.
        short_steps: on `short_tokens` of them each.
        steps: on one long sequence each, after that.
    """

    layers: int
    hidden: int
    ffn: int
    head_dim: int
    short: int
    short_tokens: int
    short_steps: int
    steps: int


SIZES = {
    "gpu": Size(
        layers=8, hidden=1024, ffn=2816, head_dim=128, short=8192, short_tokens=65536, short_steps=600, steps=30
    ),
    "cpu": Size(layers=2, hidden=64, ffn=128, head_dim=16, short=256, short_tokens=512, short_steps=2, steps=2),
}


@dataclass(frozen=True)
class Layer:
    """Inputs of a layer's attention for one sequence, its output's gradient drawn at random."""

    inputs: Inputs
    spec: AttentionSpec


def settings(size: Size, folder: Path, text: Path, *, heads: tuple[int, int], tokens: int) -> dict[str, Any]:
    """Return the configuration of a run: code as bytes, joined documents, routing of the last step alone recorded."""
    query_heads, kv_heads = heads
    sequences = size.short_tokens // size.short
    short = {"sequence_length": size.short, "global_batch_size": sequences, "micro_batch_size": sequences}
    return {
        "run": {"name": f"trained_{tokens}_{query_heads}_{kv_heads}", "directory": str(folder / "runs")},
        "model": {
            "num_layers": size.layers,
            "hidden_size": size.hidden,
            "ffn_hidden_size": size.ffn,
            "num_attention_heads": query_heads,
            "num_kv_heads": kv_heads,
            "head_dim": size.head_dim,
            "rotary_base": 5e5,
        },
        "data": {"source": "files", "paths": [str(text)], "tokenizer": "bytes", "cache": str(folder / "tokens")},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": min(30, size.short_steps // 2)},
        "training": {"sequence_length": tokens, "global_batch_size": 1},
        "stages": [
            {"name": "short", "steps": size.short_steps, "training": short, "data": {"cut_documents": size.short}},
            {
                "name": "long",
                "steps": size.steps,
                "optimizer": {"lr": 3e-4, "min_lr": 1e-4, "warmup_steps": min(5, size.steps // 2)},
            },
        ],
        "checkpoint": {"interval": 100_000},
        "logging": {"interval": 10, "routing_interval": 100_000},
    }


def train_and_capture(config: dict[str, Any], path: Path) -> tuple[float, list[Layer]]:
    """Train as `config` says, which is written to `path`; returns the last loss and the layers in their order."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    with _last_inputs() as calls:
        summary = train(load_config(path))
    assert summary.last_loss is not None  # a run that fails has raised
    of_last_stage = list(calls.items())[-config["model"]["num_layers"] :]  # each stage has modules of its own
    return summary.last_loss, [_layer(module, tensors) for module, tensors in of_last_stage]


@contextlib.contextmanager
def _last_inputs() -> Iterator[dict[DashAttention, tuple[torch.Tensor, ...]]]:
    """Give the inputs of each module's last call in training, by module in the order of their first calls."""
    calls: dict[DashAttention, tuple[torch.Tensor, ...]] = {}

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, DashAttention) and module.training:
            calls[module] = tuple(tensor.detach() for tensor in inputs[:3])

    handle = register_module_forward_pre_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def _layer(module: DashAttention, tensors: tuple[torch.Tensor, ...]) -> Layer:
    q, k, v = (tensor[:1].contiguous() for tensor in tensors)
    generator = torch.Generator(q.device).manual_seed(0)
    grad = torch.randn(q.shape, generator=generator, device=q.device, dtype=q.dtype)
    summary_query = module.summary_query.detach().to(q.dtype)
    return Layer(Inputs(q, k, v, summary_query, grad), module.spec)
