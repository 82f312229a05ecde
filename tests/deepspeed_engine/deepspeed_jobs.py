"""What the ranks of the tests of `engine: deepspeed` do: the model and batches of tests/megatron, trained by either engine.

The test process itself does not import this: it would load Megatron-core and DeepSpeed.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed_cases import STEPS, Run, Trained
from megatron_cases import CHUNK_SIZE, MODEL, ROUTING_SCALE, SEQUENCE_LENGTH, VOCAB_SIZE
from megatron_jobs import micro_batches

from dash_dist.deepspeed_engine import engine as deepspeed_module
from dash_dist.deepspeed_engine.config import DeepSpeedSection
from dash_dist.deepspeed_engine.engine import DeepSpeedEngine
from dash_dist.deepspeed_engine.slices import owned_slices
from dash_dist.megatron import AttentionConfig, Engine, OptimizerConfig, ParallelConfig, ParallelDims
from dash_dist.megatron import engine as megatron_module


@contextmanager
def engine_of(run: Run, folder: Path) -> Iterator[Engine]:
    case = run.case
    parallel = ParallelConfig(context=case.context, recompute=case.recompute)
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    arguments: dict[str, Any] = {
        "model": MODEL.model_copy(update={"tie_embeddings": case.tie_embeddings}),
        "attention": AttentionConfig(chunk_size=CHUNK_SIZE, routing_scale=ROUTING_SCALE, exchange="selective"),
        "parallel": parallel,
        "optimizer": OptimizerConfig(lr=1e-2, warmup_steps=2, grad_clip=0.5),
        "dims": dims,
        "vocab_size": VOCAB_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
        "total_steps": STEPS,
    }
    real = megatron_module.transformer_config

    def config(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
        return real(*args, dtype=torch.bfloat16 if run.bfloat16 else dtype, **kwargs)

    with mock.patch.object(megatron_module, "transformer_config", config):
        try:
            if run.zero_stage is None:
                yield Engine(**arguments)
            else:
                # Small buckets and no parameter that stays whole: a model this small would never be cut otherwise.
                file = folder / f"zero{run.zero_stage}_{dims.rank}.json"
                zero = {"stage": run.zero_stage, "reduce_bucket_size": 4000, "allgather_bucket_size": 4000}
                zero |= {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000}
                file.write_text(json.dumps({"zero_optimization": zero}))
                yield DeepSpeedEngine(deepspeed=DeepSpeedSection(file=file), **arguments)
        finally:
            dims.close()


def full_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The model's own, not the optimizer's copies."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def step_of(engine: Engine, run: Run, trained: Trained) -> None:
    result = engine.train_step(micro_batches(engine.step, engine.dims, run.case))
    assert not result.skipped
    trained.losses.append(result.loss)
    trained.grad_norms.append(result.grad_norm)
    trained.learning_rates.append(result.learning_rate)


def train(runs: dict[str, Run], folder: Path, steps: int = STEPS) -> dict[str, Trained]:
    by_name = {}
    for name, run in runs.items():
        with engine_of(run, folder) as engine:
            trained = Trained()
            engine.record_routing = True
            for _ in range(steps):
                step_of(engine, run, trained)
            trained.density = [layer.density for layer in engine.routing_statistics()]
            exchange = engine.exchange_statistics()
            trained.sent_bytes = None if exchange is None else exchange.sent_bytes
            trained.weights = full_weights(engine)
            by_name[name] = trained
    return by_name
