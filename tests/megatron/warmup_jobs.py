"""What the rank of the tests of the routing warmup does. The test process does not import this."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from dash_dist.config.attention import AttentionConfig, RoutingWarmup
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from tests.megatron.megatron_jobs import micro_batches
from tests.support.models import CHUNK_SIZE, MODEL, SEQUENCE_LENGTH, VOCAB_SIZE, Case


def train(folder: Path, steps: int, resume: Path | None) -> tuple[list[float], list[float], list[float], list[str]]:
    """Losses, curves of the scale and densities of `steps` steps; saves to `folder` after half of them."""
    case = Case(micro_batch_size=4)
    parallel = ParallelConfig()
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    try:
        attention = AttentionConfig(
            chunk_size=CHUNK_SIZE, routing_scale=16.0, routing_warmup=RoutingWarmup(start=0.5, steps=4)
        )
        engine = MegatronEngine(
            MODEL,
            attention,
            parallel,
            OptimizerConfig(lr=1e-2),
            dims=dims,
            vocab_size=VOCAB_SIZE,
            sequence_length=SEQUENCE_LENGTH,
            total_steps=10,
        )
        changes = [] if resume is None else engine.load(resume)
        losses, scales, densities = [], [], []
        for _ in range(steps):
            engine.telemetry.record_routing = True
            result = engine.train_step(micro_batches(engine.step, dims, case))
            losses.append(result.loss)
            scales.append(result.curves["routing/scale"])
            densities.append(engine.telemetry.routing_statistics()[0].density)
            if engine.step == 3 and resume is None:
                engine.start_save(folder, background=False).finish()
        return losses, scales, densities, changes
    finally:
        dims.close()
