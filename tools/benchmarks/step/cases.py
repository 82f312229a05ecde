"""Runs of the step benchmark: the settings that differ between runs of one shape.

Knows configurations; does not know how runs are started or measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dash_dist.config.run import RunConfig
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.prediction import executed_products, fp8_products
from tools.benchmarks.common.configurations import changed, run_section, write_configuration
from tools.benchmarks.common.shapes import SHAPES

VOCABULARY = 128_256
STEPS = 3
"""Steps that are timed, and profiled after that."""
MATRIX_FLOPS = 700e12
"""Sustained rate of matrix products on Hopper, from which a step's floor is computed."""
FP8_FLOPS = 2 * MATRIX_FLOPS
"""That of products in FP8, by the ratio of the peaks; 1,480 TFLOP/s were measured."""


@dataclass(frozen=True)
class Case:
    """One run of a shape.

    Attributes:
        changes: sections and keys that differ from `settings`.
        tokens: None for the benchmark's.
    """

    name: str
    shape: str = "1b"
    gpus: int = 1
    tokens: int | None = None
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


_SELECTIVE: dict[str, Any] = {"parallel": {"recompute": "selective"}}
CASES = (
    Case("fused", changes=_SELECTIVE),
    Case("fused, denser", changes=_SELECTIVE | {"attention": {"routing_scale": 8}}),
    Case("fused, only the MLP again", changes={"parallel": {"recompute": "selective", "recompute_modules": ("mlp",)}}),
    Case("fused, six layers again", changes={"parallel": {"recompute": "selective", "recompute_layers": 6}}),
    Case("fused, FP8", changes={"parallel": {"recompute": "selective", "fp8_linears": True}}),
    Case(
        "fused, eight layers again, FP8",
        changes={"parallel": {"recompute": "selective", "recompute_layers": 8, "fp8_linears": True}},
    ),
    Case("fused, all again"),
    Case("pytorch, all again", changes={"parallel": {"fused_kernels": False}}),
    Case("dense, all again", changes={"attention": {"kind": "dense"}}),
    Case("8b", shape="8b", gpus=2, changes={"parallel": {"recompute": "selective", "context": 2}}),
    Case("1b, a million", gpus=2, tokens=2**20, changes={"parallel": {"recompute": "selective", "context": 2}}),
)


def settings(case: Case, tokens: int, folder: Path) -> dict[str, Any]:
    """A run's configuration: random weights, text of Python's library as bytes, the whole vocabulary."""
    run: dict[str, dict[str, Any]] = {
        "run": run_section(case.name, folder),
        "model": SHAPES[case.shape].section() | {"vocab_size": VOCABULARY},
        "attention": {"routing_scale": 32},  # at 1 an untrained model selects every chunk
        "parallel": {"recompute": "full", "context": 1},
        "data": {"source": "stdlib", "tokenizer": "bytes", "cache": str(folder / "tokens")},
        "optimizer": {"lr": 1e-5},
        "training": {"steps": STEPS, "sequence_length": case.tokens or tokens},
        "checkpoint": {"interval": 10_000},
        "logging": {"interval": 1, "routing_interval": 10_000},
    }
    return changed(run, case.changes)


def floor_seconds(config: RunConfig, gpus: int) -> float:
    """Seconds of a step's matrix products on each GPU at `MATRIX_FLOPS` and `FP8_FLOPS`, those of attention left out.

    The planner counts the products, recomputed ones included.
    """
    layout = Layout.of(config, gpus)
    sizes = Sizes.of(config, layout, vocab_size=VOCABULARY)
    products, in_fp8 = (
        executed_products(sizes, layout, fused=config.parallel.fused_kernels),
        fp8_products(sizes, layout),
    )
    return (products - in_fp8) / MATRIX_FLOPS + in_fp8 / FP8_FLOPS


def write(case: Case, tokens: int, folder: Path) -> Path:
    """Write a case's configuration into `folder`; returns the file."""
    return write_configuration(settings(case, tokens, folder), folder)
