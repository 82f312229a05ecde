"""The section `deepspeed:`, and the DeepSpeed JSON file that it can name.

Knows which of DeepSpeed's settings a run may choose, and which follow from the rest of its configuration; does not know
DeepSpeed or torch, which it never imports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.section import Section

ZeroStage = Literal[1, 2, 3]
Elements = Annotated[int, Field(gt=0, strict=False)]  # DeepSpeed's documentation writes 5e8
ElementsOrNone = Annotated[int, Field(ge=0, strict=False)]

DECIDED_BY_RUN = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the section optimizer",
    "scheduler": "the section optimizer",
    "bf16": "the device: weights are bfloat16 on GPUs and float32 on CPUs",
    "fp16": "the device: weights are bfloat16 on GPUs and float32 on CPUs",
    "amp": "the device: weights are bfloat16 on GPUs and float32 on CPUs",
    "torch_autocast": "the device: weights are bfloat16 on GPUs and float32 on CPUs",
    "data_types": "the engine: gradients are accumulated in float32",
    "activation_checkpointing": "parallel.recompute",
    "sequence_parallel_size": "parallel.context",
    "tensor_parallel": "parallel.tensor",
    "checkpoint": "the section checkpoint",
    "tensorboard": "the section logging",
    "steps_per_print": "logging.interval",
}
"""DeepSpeed's settings that a file may hold only as "auto" -> the part of the run that decides them."""


class _Closed(Section):
    model_config = ConfigDict(strict=True)


class ZeroSettings(_Closed):
    """DeepSpeed's `zero_optimization`, with DeepSpeed's names; sizes are in elements."""

    stage: ZeroStage = 1
    reduce_bucket_size: Elements = 50_000_000
    allgather_bucket_size: Elements = 50_000_000
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    sub_group_size: Elements = 1_000_000_000
    stage3_prefetch_bucket_size: ElementsOrNone = 50_000_000
    stage3_param_persistence_threshold: ElementsOrNone = 100_000
    stage3_max_live_parameters: ElementsOrNone = 1_000_000_000
    stage3_max_reuse_distance: ElementsOrNone = 1_000_000_000


class DeepSpeedSettings(_Closed):
    """Settings that a DeepSpeed JSON file may hold here.

    Attributes:
        communication_data_type: dtype in which ZeRO-2 and ZeRO-3 reduce gradients; float32 as in every other reduction.
    """

    zero_optimization: ZeroSettings = Field(default_factory=ZeroSettings)
    communication_data_type: Literal["fp32", "bf16"] = "fp32"


class DeepSpeedSection(Section):
    """The settings of `engine: deepspeed`; other engines ignore them.

    Attributes:
        zero_stage: tensors sharded over the data- and context-parallel ranks. 1: optimizer state; 2: gradients as well;
            3: weights as well. None: the stage of `file`, or 1.
        file: DeepSpeed JSON file, such as those in configs/deepspeed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    zero_stage: ZeroStage | None = None
    file: Path | None = None

    @field_validator("file", mode="before")
    @classmethod
    def _file_is_a_path(cls, file: object) -> object:
        return Path(file) if isinstance(file, str) else file

    def settings(self) -> DeepSpeedSettings:
        """Return the settings of the file, or the defaults, at the section's stage.

        Raises:
            ValueError: the file cannot be read, holds a refused setting, or has another stage than the section.
        """
        settings = DeepSpeedSettings() if self.file is None else read_settings(self.file)
        in_file = settings.zero_optimization.stage
        if self.zero_stage is None or self.zero_stage == in_file:
            return settings
        if self.file is not None:
            raise ValueError(
                f"deepspeed.zero_stage is {self.zero_stage}, and zero_optimization.stage is {in_file} in {self.file}: "
                "set one of them only, or name another file"
            )
        zero = settings.zero_optimization.model_copy(update={"stage": self.zero_stage})
        return settings.model_copy(update={"zero_optimization": zero})


def read_settings(path: Path) -> DeepSpeedSettings:
    """Read a DeepSpeed JSON file.

    Raises:
        ValueError: it cannot be read, or holds unknown settings or settings that the run decides; all are named.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"deepspeed.file: cannot read {path}: {reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed.file: {path} is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"deepspeed.file: {path} holds {json.dumps(given)[:60]}, not DeepSpeed's settings")
    problems = [
        f'{key} is decided by {owner}: remove it, or set it to "auto"'
        for key, owner in DECIDED_BY_RUN.items()
        if given.get(key, "auto") != "auto"
    ]
    try:
        settings = DeepSpeedSettings.model_validate({k: v for k, v in given.items() if k not in DECIDED_BY_RUN})
    except ValidationError as error:
        problems += [_explain(error_of_one) for error_of_one in error.errors()]
    if problems:
        raise ValueError(f"deepspeed.file: {path} is refused: {'; '.join(problems)}")
    return settings


def check_engine(parallel: ParallelConfig, section: DeepSpeedSection) -> None:
    """Refuse settings that `engine: deepspeed` does not support.

    Raises:
        ValueError: the message gives the value and the change to make.
    """
    if parallel.sequence_parallel:
        raise ValueError(
            "parallel.sequence_parallel is true, and engine: deepspeed has no tensor parallelism to split over: set "
            "parallel.sequence_parallel to null, or engine to megatron"
        )
    for name, size in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
        if size != 1:
            raise ValueError(
                f"parallel.{name} is {size}, and engine: deepspeed shards over data and context parallelism only: "
                f"set parallel.{name} to 1, or engine to megatron"
            )
    if parallel.overlap_gradients:
        raise ValueError(
            "parallel.overlap_gradients is of engine: megatron: set it to false, and zero_optimization.overlap_comm in "
            "deepspeed.file"
        )
    stage = section.settings().zero_optimization.stage
    if stage == 3 and parallel.mlp_tile_tokens is not None:
        raise ValueError(
            f"parallel.mlp_tile_tokens is {parallel.mlp_tile_tokens}, and ZeRO stage 3 has taken the weights apart "
            "when the backward pass of a tiled MLP begins: set deepspeed.zero_stage to 1 or 2, or "
            "parallel.mlp_tile_tokens to null"
        )


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        model = ZeroSettings if key.startswith("zero_optimization.") else DeepSpeedSettings
        return f"{key} is not supported here, only {', '.join(model.model_fields)} are"
    return f"{key} = {json.dumps(error['input'])[:60]}: {error['msg'][0].lower()}{error['msg'][1:]}"
