"""The configuration of one run: its sections, and the conditions on their combination.

Knows every setting and the combinations that cannot work on any machine; does not know the source of the settings
(`file.py` does).
"""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.data import DataConfig, SourceConfig, check_separate
from dash_dist.config.deepspeed import DeepSpeedSection, check_engine
from dash_dist.config.evaluation import SAME_TOKENS, TAKEN_OVER, EvaluationSection
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.section import Section

Positive = Annotated[int, Field(gt=0)]


class RunSection(Section):
    """Name, place and start of the run.

    Attributes:
        name: folder of the run in `directory`.
        directory: folder of all runs; with several nodes, on a file system that all of them share.
        seed: seed of the initial weights.
        resume: "auto" resumes from the run's latest checkpoint, if there is one. "never" refuses to start if there is
            one. A path to a checkpoint folder (`.../checkpoints/step_*`) starts a new run from it.
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
        # The start of the run checks that it exists: its storage may not be mounted here.
        if resume not in ("auto", "never") and ("/" not in resume or "\0" in resume or not _is_encodable(resume)):
            raise ValueError(
                "neither auto, never nor a folder: name a checkpoint's, such as runs/NAME/checkpoints/step_*"
            )
        return resume

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.directory / self.name


class TrainingSection(Section):
    """Length and batch sizes of the training loop.

    Attributes:
        steps: optimizer steps of the whole run.
        sequence_length: tokens of a sequence (T), before it is split over context-parallel ranks.
        global_batch_size: sequences per optimizer step, over all data-parallel ranks.
        micro_batch_size: sequences per forward pass of one data-parallel rank. Gradients are accumulated over passes.
        distributed_timeout_seconds: seconds that a rank waits for another one before the run ends.
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
    """Checkpoints every `interval` steps and at the end.

    Attributes:
        interval: steps between checkpoints.
        keep: number of latest checkpoints to keep.
        keep_every_hours: hours of wall time between older checkpoints that are kept permanently; None keeps none.
        asynchronous: train while a checkpoint is written. Needs host memory for the rank's part of weights and
            optimizer state.
    """

    interval: Positive = 500
    keep: Positive = 2
    keep_every_hours: Annotated[float, Field(gt=0)] | None = None
    asynchronous: bool = True


class FaultsSection(Section):
    """Limits on the faults that a run tolerates.

    Attributes:
        max_skipped_steps: consecutive skipped steps that the run tolerates before it rolls back to a checkpoint. A
            step is skipped if its loss or gradient norm is not finite: no weight changes, and its batch is dropped.
        spike_z_score: deviations above the median of the last `spike_window` losses that make a loss a spike. The run
            then rolls back to its newest checkpoint and drops the batch of that step. The deviation is the median
            absolute deviation, scaled to that of a normal distribution. None disables the search for spikes.
        spike_window: finite losses in the median. Detection starts when the window is full.
        max_rollbacks: rollbacks over all attempts; one more ends the run.
        max_failed_saves: consecutive checkpoints that cannot be written; one more ends the run.
        save_timeout_seconds: longest time to write a checkpoint in the background; a longer one counts as failed. None
            disables the limit.
        hang_timeout_seconds: longest time of a step with its data and checkpoint; a slower process writes its stacks
            and ends. Set it below training.distributed_timeout_seconds, or ranks that wait for a hung one give up
            before they write their stacks. None disables the limit.
    """

    max_skipped_steps: Positive = 10
    spike_z_score: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    spike_window: Annotated[int, Field(ge=10)] = 100
    max_rollbacks: Annotated[int, Field(ge=0)] = 5
    max_failed_saves: Annotated[int, Field(ge=0)] = 20
    save_timeout_seconds: Positive | None = 3600
    hang_timeout_seconds: Positive | None = 1200


class LoggingSection(Section):
    """Intervals of TensorBoard's content; the first and the last step of a run write all of it.

    Attributes:
        interval: steps between points of the curves, and between progress lines.
        routing_interval: steps between records of density and selected chunks, for every layer.
        heat_map_interval: steps between heat maps of the routing. A heat map computes the routing of its layer twice.
        heat_map_layers: layers to draw, counted from 0; None draws the first, the middle and the last with routing, ()
            none. Drawing needs the extra `report`.
    """

    interval: Positive = 10
    routing_interval: Positive = 50
    heat_map_interval: Positive = 500
    heat_map_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None


class RunConfig(Section):
    """All settings that determine a run.

    `engine` selects Megatron-core's optimizer, or DeepSpeed's ZeRO with the settings of the section `deepspeed`.

    Raises:
        pydantic.ValidationError: a setting or a combination is refused. `load_config` makes it readable.
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
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)

    @model_validator(mode="before")
    @classmethod
    def _heldout_data_is_as_the_data(cls, settings: Any) -> Any:
        match settings:
            case {"data": dict(data), "evaluation": {"data": dict(heldout), **others}}:
                taken = {name: data[name] for name in TAKEN_OVER if name in data}
                return {**settings, "evaluation": {**others, "data": taken | heldout}}
        return settings

    @model_validator(mode="after")
    def _warmup_ends(self) -> "RunConfig":
        warmup, decay = self.optimizer.warmup_steps, self.optimizer.decay_steps
        if warmup >= (decay or self.training.steps):
            end = f"training.steps = {self.training.steps}" if decay is None else f"optimizer.decay_steps = {decay}"
            remedy = "train longer" if decay is None else "decay longer"
            raise ValueError(
                f"optimizer.warmup_steps = {warmup} is not below {end}: lower it, to 0 if need be, or {remedy}"
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
        kinds = self.attention.kinds(layers)
        if others := [layer for layer in drawn if kinds[layer] != "dash"]:
            raise ValueError(
                f"logging.heat_map_layers = {drawn} names {others[0]}, a {kinds[others[0]]} layer: "
                "it has no routing, name layers of kind dash"
            )
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
    def _evaluation_fits(self) -> "RunConfig":
        evaluation, heldout = self.evaluation, self.evaluation.data
        length = self.training.sequence_length
        if beyond := [end for end in evaluation.buckets if end > length]:
            raise ValueError(
                f"evaluation.buckets names {beyond[0]}, and training.sequence_length is {length}: "
                "give lengths within the sequence"
            )
        if heldout is None:
            if evaluation.interval is not None:
                raise ValueError(
                    f"evaluation.interval = {evaluation.interval} needs evaluation.data: name documents that are not "
                    "trained on, or set evaluation.interval to null"
                )
            return self
        for name in SAME_TOKENS:
            if (given := getattr(heldout, name)) != (trained := getattr(self.data, name)):
                raise ValueError(
                    f"evaluation.data.{name} = {given} and data.{name} = {trained}: the model reads the tokens that "
                    f"it is trained on; drop evaluation.data.{name}"
                )
        trained_on = [one.model_dump(include=set(SourceConfig.model_fields)) for one in self.data.all_sources]
        for source in heldout.all_sources:
            same = source.model_dump(include=set(SourceConfig.model_fields)) in trained_on
            if same and evaluation.interval is not None:
                raise ValueError(
                    f"evaluation.data reads {source.title}, which is trained on: name documents that are held out"
                )
        if heldout.documents == "separate":
            check_separate(
                sequence_length=length,
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
        """Return the configuration of later attempts, which resume from the checkpoints of earlier ones."""
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
        sequences = self.evaluation.sequences
        if self.evaluation.interval is not None and sequences % unit:
            raise ValueError(
                f"evaluation.sequences = {sequences} is not a multiple of data-parallel size x "
                f"training.micro_batch_size = {dp_size} x {self.training.micro_batch_size}: "
                f"set it to {-(-sequences // unit) * unit}"
            )


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair, which YAML can spell
        return False
    return True
