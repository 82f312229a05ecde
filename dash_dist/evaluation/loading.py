"""The run to evaluate: its configuration, its checkpoint, and its model on the processes that there are.

Knows the files of a run and the engines' checkpoints; does not know tasks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dash_dist.checkpoints import integrity
from dash_dist.checkpoints.engine_state import EngineState, read_engine_state
from dash_dist.checkpoints.folders import step_folder, step_of, visible_checkpoints
from dash_dist.checkpoints.integrity import ENGINE, DamagedCheckpoint, read_metadata
from dash_dist.config.file import load_config, overridden
from dash_dist.config.run import RunConfig
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import CheckpointError, ConfigError
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.predictor import LoadWeights, MegatronPredictor

CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, and the checkpoint in it that was named; None for the newest."""

    path: Path
    checkpoint: Path | None = None

    @classmethod
    def of(cls, path: Path, *, step: int | None) -> RunFolder:
        """Find the run that `path` is, or is a checkpoint of. Raises ConfigError."""
        if (path / CONFIG).is_file():
            return cls(path, None if step is None else path / "checkpoints" / step_folder(step))
        run = path.absolute().parents[1]
        if step_of(path) is not None and path.is_dir() and (run / CONFIG).is_file():
            if step is not None:
                raise ConfigError(f"{path} is a checkpoint, and --step names one, too: drop --step or name the run")
            return cls(run, path)
        raise ConfigError(
            f"{path} is neither a run nor a checkpoint of one: name a folder with {CONFIG}, such as runs/NAME, "
            "or runs/NAME/checkpoints/step_*"
        )

    @property
    def step(self) -> int:
        """Step of the checkpoint, as its folder says; 0 where none is named."""
        return (step_of(self.checkpoint) if self.checkpoint else None) or 0

    def with_checkpoint(self) -> RunFolder:
        """Return the folder with its newest checkpoint named, if none is. Raises CheckpointError."""
        return replace(self, checkpoint=self.find_checkpoint()[0])

    def find_checkpoint(self) -> tuple[Path, float]:
        """Return the checkpoint and when it was saved, in seconds since 1970. Raises CheckpointError."""
        found = visible_checkpoints(self.path / "checkpoints")
        folder = self.checkpoint or (found[-1] if found else None)
        if folder is None:
            raise CheckpointError(f"{self.path} has no complete checkpoint: let the run save one")
        if not folder.is_dir():
            steps = ", ".join(str(step_of(one)) for one in found) or "none"
            raise CheckpointError(f"{folder} is not there: the run has the checkpoints of steps {steps}")
        try:
            return folder, read_metadata(folder).saved_at
        except DamagedCheckpoint as error:
            raise CheckpointError(f"{error}; name another checkpoint with --step") from error


def fitting_layout(config: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, str | None]:
    """Return the configuration on the processes that there are, and a remark if that changed its layout.

    The run's own layout is kept where it fits, and where `overrides` ask for one. Otherwise all processes share each
    sequence.
    """
    if dist.is_initialized():
        world_size = dist.get_world_size()
    else:
        world_size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    parallel = config.parallel
    if any(override.startswith("parallel.") for override in overrides):
        return config, None
    if world_size % (parallel.tensor * parallel.pipeline * parallel.context) == 0:
        return config, None
    fitting = parallel.model_copy(update={"tensor": 1, "pipeline": 1, "context": world_size, "sequence_parallel": None})
    attention = config.attention.model_copy(update={"ranks_per_node": None})
    remark = (
        f"the run's layout, tp {parallel.tensor} x cp {parallel.context} x pp {parallel.pipeline}, does not fit "
        f"{world_size} process{'es' if world_size > 1 else ''}: evaluating with parallel.context={world_size}"
    )
    return config.model_copy(update={"parallel": fitting, "attention": attention}), remark


def load_stage(path: Path, step: int, overrides: Sequence[str]) -> RunConfig:
    """Return a run's configuration in the stage of step `step`, with `overrides`.

    Raises:
        ConfigError: see `load_config`.
    """
    return overridden(load_config(path).stage_at(max(0, step - 1)).config, overrides)


def load_as_saved(path: Path, state: EngineState, overrides: Sequence[str]) -> RunConfig:
    """Return a run's configuration with the function that a checkpoint's weights were trained in, and `overrides`.

    The routing scale is that of the checkpoint's step, and after a conversion phase it is the routing that is used.

    Raises:
        ConfigError: see `load_config`.
    """
    phases = ["attention.routing_warmup=null", "attention.conversion=null"]
    saved = [f"{name}={json.dumps(value)}" for name, value in state.function.items()]
    return load_stage(path, state.step, [*phases, *saved, *overrides])


def read_state(checkpoint: Path) -> EngineState:
    """Return the state of the checkpoint of either engine that is not a tensor.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    index = checkpoint / ENGINE / "deepspeed.json"
    if not index.is_file():
        return read_engine_state(checkpoint / ENGINE)
    try:
        return EngineState(**json.loads(index.read_text(encoding="utf-8"))["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged or of another program: {error!r}") from error


def verify(checkpoint: Path, control: ControlGroup) -> None:
    """Read and compare all files, shared out over the ranks. A collective: all ranks call it.

    Raises:
        CheckpointError: at every rank: a file is damaged, missing or not safe to load.
    """
    with control.together(f"{checkpoint} cannot be read", CheckpointError):
        metadata = read_metadata(checkpoint)
        by_size = sorted(metadata.files, key=lambda name: (metadata.files[name].size, name))
        found = integrity.find_damage(checkpoint, metadata, by_size[control.rank :: control.size])
        if control.is_main:
            found |= integrity.find_unlisted(checkpoint, metadata)
    damage = [message for of_rank in control.gather(list(found.values())) for message in of_rank]
    if damage:
        raise CheckpointError(f"{damage[0]}; name another checkpoint with --step")


def load_predictor(
    config: RunConfig,
    checkpoint: Path,
    dims: ParallelDims,
    control: ControlGroup,
    *,
    vocab_size: int,
    sequence_length: int,
) -> tuple[MegatronPredictor, list[str]]:
    """Build the model with the weights of a verified checkpoint. A collective: all ranks call it.

    Returns:
        The model, and the settings that change the function of its weights.

    Raises:
        ConfigError: at every rank: the model cannot be built.
        CheckpointError: at every rank: the checkpoint is not one of this model.
    """
    arguments: dict[str, Any] = {"vocab_size": vocab_size, "sequence_length": sequence_length}
    with control.together("the model cannot be built", ConfigError):
        predictor = MegatronPredictor(
            config.model, config.attention, config.parallel, trainable=config.trainable, dims=dims, **arguments
        )
    with control.together(f"{checkpoint} cannot be loaded", CheckpointError):
        changes = predictor.load(checkpoint / ENGINE, _loader(checkpoint))
    return predictor, changes


def _loader(checkpoint: Path) -> LoadWeights:
    if (checkpoint / ENGINE / "deepspeed.json").is_file():
        from dash_dist.deepspeed_engine.checkpoint import load_weights as load_weights_of_deepspeed

        return load_weights_of_deepspeed
    from dash_dist.megatron.checkpoint import load_weights

    return load_weights
