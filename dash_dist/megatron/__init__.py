"""The model, its parallelism, its optimizer and its checkpoint format, on top of Megatron-core.

Knows Megatron-core. Does not know where batches come from, nor the files of a run.

Names are imported on first use: importing this package for a config alone does not load Megatron-core (seconds).
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

# Warnings of Megatron-core that say nothing to the users of this package: Apex and Transformer Engine are
# never used, the optimizer looks at the gradient of its (non-leaf) shards on purpose, and it calls parts of
# torch that have newer names.
for _message, _module in (
    (r"(Transformer Engine and )?Apex (is|are) not installed", r"megatron\."),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor", r"megatron\.core\.optimizer\."),
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)`", r"torch\.distributed\."),
    (r"`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\."),
    (r"Please use DTensor instead", r"torch\.distributed\.checkpoint\."),
):
    warnings.filterwarnings("ignore", message=_message, module=_module)

if TYPE_CHECKING:
    from dash_dist.megatron.batch import BatchError
    from dash_dist.megatron.config import (
        AttentionConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        check_combination,
    )
    from dash_dist.megatron.engine import Engine, MicroBatch, StepResult
    from dash_dist.megatron.flops import flops_per_token
    from dash_dist.megatron.parallel import ParallelDims
    from dash_dist.megatron.routing import LayerRouting
    from dash_dist.megatron.selection_map import SelectionMap
    from dash_dist.megatron.traffic import ExchangeStatistics

_MODULE_OF = {
    "AttentionConfig": "config",
    "BatchError": "batch",
    "Engine": "engine",
    "ExchangeStatistics": "traffic",
    "LayerRouting": "routing",
    "MicroBatch": "engine",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "ParallelConfig": "config",
    "ParallelDims": "parallel",
    "SelectionMap": "selection_map",
    "StepResult": "engine",
    "check_combination": "config",
    "flops_per_token": "flops",
}

__all__ = [
    "AttentionConfig",
    "BatchError",
    "Engine",
    "ExchangeStatistics",
    "LayerRouting",
    "MicroBatch",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParallelDims",
    "SelectionMap",
    "StepResult",
    "check_combination",
    "flops_per_token",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
