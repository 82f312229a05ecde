"""Jobs of the ranks of the tests of next tokens.

The test process itself does not import this: it would load Megatron-core.
"""

from pathlib import Path
from typing import Any

import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.megatron.checkpoint import load_weights
from dash_dist.megatron.predictor import MegatronPredictor
from tests.megatron.megatron_jobs import engine_of, micro_batches
from tests.support.models import CHUNK_SIZE, MODEL, SEQUENCE_LENGTH, VOCAB_SIZE, Case, global_batch

POSITIONS = torch.tensor([[0, 1, 63, 64, 127], [5, 5, 100, 99, 31], [126, 16, 15, 17, 0]])
ROWS = len(POSITIONS)


def from_logits() -> torch.Tensor:
    """Next tokens of `POSITIONS` by the logits of every position."""
    with engine_of(Case()) as engine, torch.no_grad():
        logits = engine.model(global_batch(0).tokens[:ROWS], None, None)
        return logits.argmax(dim=2).gather(1, POSITIONS)


def next_tokens(cases: dict[str, Case]) -> dict[str, tuple[torch.Tensor, list[float]]]:
    """Next tokens, and density by layer of the last rows, by case."""
    found = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            engine.telemetry.record_routing = True
            tokens = engine.next_tokens(global_batch(0).tokens[:ROWS], POSITIONS)
            found[name] = tokens, [layer.density for layer in engine.telemetry.routing_statistics()]
    return found


def bad_calls() -> dict[str, str]:
    """Errors at this rank where rank 1 is given something else."""
    rows = global_batch(0).tokens[:ROWS]
    seen = {}
    with engine_of(Case(context=2)) as engine:

        def catch(name: str, tokens: torch.Tensor, positions: torch.Tensor) -> None:
            is_bad = engine.dims.rank == 1
            try:
                engine.next_tokens(tokens if is_bad else rows, positions if is_bad else POSITIONS)
            except Exception as error:
                seen[name] = f"{type(error).__name__}: {error}"

        catch("beyond", rows, POSITIONS + 1)
        catch("many", rows, torch.zeros(ROWS, 257, dtype=torch.int64))
        catch("none", rows, POSITIONS[:, :0])
        catch("short", rows[:, :100], POSITIONS % 100)
        catch("other rows", global_batch(1).tokens[:ROWS], POSITIONS)
        catch("other positions", rows, POSITIONS.flip(1))
        catch("foreign tokens", rows + VOCAB_SIZE, POSITIONS)
        seen["after"] = str(engine.next_tokens(rows, POSITIONS).shape)
    return seen


def trainings() -> tuple[list[float], list[float]]:
    """Losses of a training without, and with, predictions between the steps."""
    return _training(predict=False), _training(predict=True)


def _training(*, predict: bool) -> list[float]:
    case = Case(recompute="full")
    with engine_of(case) as engine:
        losses = []
        for step in range(3):
            losses.append(engine.train_step(micro_batches(step, engine.dims, case)).loss)
            if predict:
                engine.next_tokens(global_batch(9).tokens[:ROWS], POSITIONS)
        return losses


def save(folder: Path) -> torch.Tensor:
    """Train a step and save; returns the next tokens of the trained weights."""
    case = Case(distributed_optimizer=True)
    with engine_of(case) as engine:
        engine.train_step(micro_batches(0, engine.dims, case))
        engine.start_save(folder, background=False).finish()
        return engine.next_tokens(global_batch(0).tokens[:ROWS], POSITIONS)


def predict(folder: Path, cases: dict[str, Case], routing_scale: float) -> dict[str, Any]:
    """Next tokens by predictors that load `folder` and are made for another length and another routing scale."""
    found = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            predictor = MegatronPredictor(
                MODEL,
                AttentionConfig(chunk_size=CHUNK_SIZE, routing_scale=1.0, layout=case.layout),
                ParallelConfig(tensor=case.tensor, context=case.context, pipeline=case.pipeline),
                trainable=TrainableSection(),
                dims=engine.dims,
                vocab_size=VOCAB_SIZE,
                sequence_length=2 * SEQUENCE_LENGTH,
            )
            changes = predictor.load(folder, load_weights)
            predictor.set_sequence_length(SEQUENCE_LENGTH)
            predictor.set_routing_scale(routing_scale)
            found[name] = predictor.next_tokens(global_batch(0).tokens[:ROWS], POSITIONS), changes
    return found
