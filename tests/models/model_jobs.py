"""What the ranks of the tests of imported models do. The test process itself does not import this."""

from datetime import timedelta
from pathlib import Path

import torch

from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from tests.models.tiny_models import SEQUENCE_LENGTH, attention_of_case, tokens
from tests.support.models import Batch


def _engine(name: str, model: ModelConfig, parallel: ParallelConfig) -> MegatronEngine:
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    return MegatronEngine(
        model,
        attention_of_case(name),
        parallel,
        OptimizerConfig(lr=1e-2, warmup_steps=0),
        dims=dims,
        vocab_size=model.vocab_size or 0,
        sequence_length=SEQUENCE_LENGTH,
        total_steps=10,
    )


def logits_of(models: dict[str, ModelConfig]) -> dict[str, torch.Tensor | str]:
    """Logits [1, T, vocab] of each model that starts from its weights; the error's text where it cannot."""
    found: dict[str, torch.Tensor | str] = {}
    for name, model in models.items():
        engine = None
        try:
            engine = _engine(name, model, ParallelConfig())
            with torch.no_grad():
                found[name] = engine.model(tokens(), None, None)[..., : model.vocab_size]
        except ValueError as error:
            found[name] = str(error)
        finally:
            _close(engine)
    return found


def train_and_save(models: dict[str, ModelConfig], parallel: ParallelConfig, folder: Path) -> dict[str, list[float]]:
    """Losses of two steps of each model from its weights, with a checkpoint after them."""
    losses = {}
    for name, model in models.items():
        engine = _engine(name, model, parallel)
        batch = Batch(tokens(), tokens().roll(-1, 1), torch.ones(1, SEQUENCE_LENGTH, dtype=torch.bool))
        losses[name] = [engine.train_step([batch]).loss for _ in range(2)]
        engine.start_save(folder / name, background=False).finish()
        _close(engine)
    return losses


def load_and_read(models: dict[str, ModelConfig], folder: Path) -> dict[str, torch.Tensor]:
    """Logits [1, T, vocab] of each checkpoint, loaded on one rank."""
    found = {}
    for name, model in models.items():
        engine = _engine(name, model.model_copy(update={"weights": None}), ParallelConfig())
        engine.load(folder / name)
        with torch.no_grad():
            found[name] = engine.model(tokens(), None, None)[..., : model.vocab_size]
        _close(engine)
    return found


def errors(models: dict[str, ModelConfig]) -> dict[str, str]:
    """The error of each model that cannot start."""
    return {name: result for name, result in logits_of(models).items() if isinstance(result, str)}


def _close(engine: MegatronEngine | None) -> None:
    from megatron.core import parallel_state

    if engine is not None:
        engine.dims.close()
    elif parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
            torch.distributed.destroy_process_group()
