"""The configuration of one run: its sections, and what their combination must satisfy.

Knows every setting and which combinations cannot work, whatever machine the run will be on; does not know
where the settings come from (`config_file` does).
"""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.data import DataConfig, check_separate
from dash_dist.config.deepspeed import DeepSpeedSection, check_engine
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.section import Section

Positive = Annotated[int, Field(gt=0)]


class RunSection(Section):
    """Name, place and start of the run.

    Attributes:
        name: folder of the run below `directory`.
        directory: where runs are kept; with several nodes on a filesystem that all of them share.
        seed: seeds the initial weights.
        resume: "auto" goes on from the run's latest checkpoint, if it has any; "never" refuses to start if it
            has one; a path names the checkpoint folder (`.../checkpoints/step_*`) that a new run begins from.
    """

    name: str
    directory: Path = Path("runs")
    seed: Annotated[int, Field(ge=0)] = 1234
    resume: str = "auto"

    @field_validator("directory", mode="before")
    @classmethod
    def _directory_is_a_path(cls, directory: object) -> object:
        if not isinstance(directory, str):
            return directory
        if "\0" in directory or not _is_encodable(directory):
            raise ValueError("holds a character that no path can have")
        return Path(directory)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError("becomes a folder: use letters, digits, '_', '-' and '.' only")
        return name

    @field_validator("resume")
    @classmethod
    def _resume_is_known(cls, resume: str) -> str:
        # Whether it is there is seen where the run starts: here, its storage may not be mounted.
        if resume not in ("auto", "never") and ("/" not in resume or "\0" in resume or not _is_encodable(resume)):
            raise ValueError(
                "neither auto, never nor a folder: name a checkpoint's, such as runs/NAME/checkpoints/step_*"
            )
        return resume

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self.directory / self.name


class TrainingSection(Section):
    """The loop.

    Attributes:
        steps: optimizer steps of the whole run.
        sequence_length: tokens of a sequence (T), before it is split over context-parallel ranks.
        global_batch_size: sequences per optimizer step, over all data-parallel ranks.
        micro_batch_size: sequences per forward pass of one data-parallel rank; the rest is accumulated.
        distributed_timeout_seconds: a rank that waits this long for another one ends the run.
    """

    steps: Positive
    sequence_length: Annotated[int, Field(gt=1)]
    global_batch_size: Positive = 1
    micro_batch_size: Positive = 1
    distributed_timeout_seconds: Annotated[int, Field(gt=0, le=365 * 86400)] = 1800

    @property
    def distributed_timeout(self) -> timedelta:
        return timedelta(seconds=self.distributed_timeout_seconds)


class CheckpointSection(Section):
    """A checkpoint every `interval` steps and at the end.

    Attributes:
        interval: steps from one checkpoint to the next.
        keep: the latest stay, so many of them.
        keep_every_hours: of the older ones, one per so many hours of wall time stays for good; none by default.
        asynchronous: train on while a checkpoint is written. Takes host memory for the rank's part of weights and
            optimizer state.
    """

    interval: Positive = 500
    keep: Positive = 2
    keep_every_hours: Annotated[float, Field(gt=0)] | None = None
    asynchronous: bool = True


class FaultsSection(Section):
    """Faults that a run tolerates, and its reaction to them.

    Attributes:
        max_skipped_steps: a step whose loss or gradient norm is not finite changes no weight and its batch is left
            out; more of them than this in a row set the run back to a checkpoint.
        spike_z_score: a loss this many deviations above the median of the last `spike_window` sets the run back to
            its newest checkpoint, and that step's batch is left out. The deviation is the median absolute one, scaled
            to a normal distribution's. None does not look for spikes.
        spike_window: finite losses that the median is taken of; no spike is seen before there are as many.
        max_rollbacks: the run ends when it would be set back more often than this, over all its attempts.
        max_failed_saves: the run ends when more checkpoints than this in a row cannot be written.
        save_timeout_seconds: a checkpoint that takes longer to be written beside the training counts as one that cannot
            be written. None waits for ever.
        hang_timeout_seconds: a process whose step, with its data and its checkpoint, takes longer writes its stacks
            and ends. Below training.distributed_timeout_seconds, or a rank that waits for the one that hangs gives up
            before it writes its own. None waits for ever.
    """

    max_skipped_steps: Positive = 10
    spike_z_score: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    spike_window: Annotated[int, Field(ge=10)] = 100
    max_rollbacks: Annotated[int, Field(ge=0)] = 5
    max_failed_saves: Annotated[int, Field(ge=0)] = 20
    save_timeout_seconds: Positive | None = 3600
    hang_timeout_seconds: Positive | None = 1200


class LoggingSection(Section):
    """Intervals of TensorBoard's content; the first and the last step of a run have all of it.

    Attributes:
        interval: steps between two points of the curves, and two progress lines.
        routing_interval: steps between two looks at every layer's density and selected chunks.
        heat_map_interval: steps between two pictures of the routing; one costs its layers a second routing.
        heat_map_layers: which ones are drawn, from 0; None for the first, the middle and the last.
    """

    interval: Positive = 10
    routing_interval: Positive = 50
    heat_map_interval: Positive = 500
    heat_map_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None


class RunConfig(Section):
    """Everything a run is determined by.

    `engine` is what trains the model: Megatron-core's optimizer, or DeepSpeed's ZeRO as the section `deepspeed` says.

    Raises pydantic.ValidationError, which `load_config` turns into a readable error.
    """

    engine: Literal["megatron", "deepspeed"] = "megatron"
    run: RunSection
    model: ModelConfig
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    training: TrainingSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    faults: FaultsSection = Field(default_factory=FaultsSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @model_validator(mode="after")
    def _warmup_ends(self) -> "RunConfig":
        warmup, steps = self.optimizer.warmup_steps, self.training.steps
        if warmup >= steps:
            raise ValueError(
                f"optimizer.warmup_steps = {warmup} is not below training.steps = {steps}: "
                f"lower it, to 0 if need be, or train longer"
            )
        return self

    @model_validator(mode="after")
    def _drawn_layers_exist(self) -> "RunConfig":
        drawn, layers = list(self.logging.heat_map_layers or ()), self.model.num_layers
        if beyond := [layer for layer in drawn if layer >= layers]:
            raise ValueError(
                f"logging.heat_map_layers = {drawn} names {beyond[0]}, and model.num_layers is {layers}: "
                f"give layers from 0 to {layers - 1}"
            )
        if len(set(drawn)) < len(drawn):
            raise ValueError(f"logging.heat_map_layers = {drawn} names a layer twice: name each once")
        return self

    @model_validator(mode="after")
    def _documents_fit(self) -> "RunConfig":
        if self.data.documents == "separate":
            check_separate(
                sequence_length=self.training.sequence_length,
                micro_batch_size=self.training.micro_batch_size,
                chunk_size=self.attention.chunk_size,
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> "RunConfig":
        if self.engine == "deepspeed":
            check_engine(self.parallel, self.deepspeed)
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "RunConfig":
        self.check_world_size(self.parallel.tensor * self.parallel.context * self.parallel.pipeline)
        return self

    def going_on(self) -> "RunConfig":
        """For the attempts after the first: the checkpoints that are there by then are this run's own."""
        if self.run.resume != "never":
            return self
        return self.model_copy(update={"run": self.run.model_copy(update={"resume": "auto"})})

    def check_world_size(self, world_size: int) -> None:
        """Refuse, with ValueError, a number of processes that this configuration cannot run on."""
        check_combination(
            self.model,
            self.attention,
            self.parallel,
            world_size=world_size,
            sequence_length=self.training.sequence_length,
        )
        dp_size = self.parallel.data_parallel_size(world_size)
        unit = dp_size * self.training.micro_batch_size
        batch = self.training.global_batch_size
        if batch % unit:
            raise ValueError(
                f"training.global_batch_size = {batch} is not a multiple of data-parallel size x "
                f"training.micro_batch_size = {dp_size} x {self.training.micro_batch_size}: "
                f"set it to {-(-batch // unit) * unit}"
            )


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair, which YAML can spell
        return False
    return True
