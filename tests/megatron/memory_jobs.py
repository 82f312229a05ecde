"""What the rank of the tests of memory on a GPU does. The test process does not import this."""

from __future__ import annotations

import gc
from datetime import timedelta
from typing import Any

import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.host_memory import BLOCK_BYTES
from dash_dist.megatron.parallel import ParallelDims
from tests.support.models import Batch


def steps_on_a_gpu(model: ModelConfig, tokens: int, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each group of settings under full recomputation: losses of three steps, the last gradients, bytes at the peak
    of the last step, and bytes on the host."""
    return {name: _steps(model, tokens, chosen) for name, chosen in settings.items()}


def _steps(model: ModelConfig, tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    gc.collect()  # hooks hold the engine before in a cycle, and its memory would count
    parallel = ParallelConfig(recompute="full", **settings)
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    try:
        engine = MegatronEngine(
            model,
            AttentionConfig(),
            parallel,
            OptimizerConfig(lr=1e-3),
            dims=dims,
            vocab_size=1000,
            sequence_length=tokens,
            total_steps=4,
        )
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(3):
            numbers = torch.randint(1000, (1, tokens + 1), generator=generator)
            torch.cuda.reset_peak_memory_stats()
            counted = torch.ones(1, tokens, dtype=torch.bool)
            losses.append(engine.train_step([Batch(numbers[:, :-1], numbers[:, 1:], counted)]).loss)
        offload = engine._trained.offload
        return {
            "losses": losses,
            "gradients": {name: weight.main_grad.cpu() for name, weight in engine.model.named_parameters()},
            "peak": torch.cuda.max_memory_allocated(),
            "host": 0 if offload is None else offload.pool.allocated * BLOCK_BYTES,
        }
    finally:
        dims.close()
