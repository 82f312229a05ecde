"""The engine that a configuration asks for.

Knows which engines there are and what each takes; does not know how they train.
"""

from typing import Any

from dash_dist.config.run import RunConfig
from dash_dist.engine.protocol import Engine
from dash_dist.extras import require_extra
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims


def build_engine(config: RunConfig, dims: ParallelDims, vocab_size: int, *, resumed: bool = False) -> Engine:
    """The model of the run with what trains it. A collective: all ranks call it.

    Args:
        dims: initialised with `config.parallel`.
        vocab_size: tokens of the embedding.
        resumed: the weights come from a checkpoint, and `model.weights` is not read.

    Raises:
        ValueError: the configuration is impossible on this rank's device, or `model.weights` cannot be read.
        ConfigError: engine=deepspeed without the extra `deepspeed`.
    """
    if config.engine == "deepspeed":
        require_extra("deepspeed", "engine=deepspeed")
    arguments: dict[str, Any] = {
        "model": config.model.model_copy(update={"weights": None}) if resumed else config.model,
        "attention": config.attention,
        "parallel": config.parallel,
        "optimizer": config.optimizer,
        "trainable": config.trainable,
        "dims": dims,
        "vocab_size": vocab_size,
        "sequence_length": config.training.sequence_length,
        "total_steps": config.training.steps,
        "seed": config.run.seed,
    }
    if config.engine == "deepspeed":
        from dash_dist.deepspeed_engine.engine import DeepSpeedEngine  # DeepSpeed takes seconds to load

        return DeepSpeedEngine(deepspeed=config.deepspeed, **arguments)
    return MegatronEngine(**arguments)
