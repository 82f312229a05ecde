"""The configuration of one run: its sections, and the conditions on their combination.

Knows every setting and the combinations that cannot work on any machine; does not know the source of the settings
(`file.py` does).
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.data import DataConfig, SourceConfig, check_separate
from dash_dist.config.deepspeed import DeepSpeedSection, check_engine
from dash_dist.config.evaluation import SAME_TOKENS, TAKEN_OVER, EvaluationSection
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig, check_offload
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.section import Section
from dash_dist.config.selection import ROUTED_KINDS
from dash_dist.config.stages import GateSection, StageSection, complete_training, stage_settings
from dash_dist.config.trainable import TrainableSection, check_adapters
from dash_dist.config.training import TrainingSection
from dash_dist.config.upkeep import CheckpointSection, FaultsSection, LoggingSection


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


class RunConfig(Section):
    """All settings that determine a run.

    `engine` selects Megatron-core's optimizer, or DeepSpeed's ZeRO with the settings of the section `deepspeed`. With
    `stages`, the sections hold what the stages have in common, and `stage_list` the settings of each.

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
    trainable: TrainableSection = Field(default_factory=TrainableSection)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    training: TrainingSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    faults: FaultsSection = Field(default_factory=FaultsSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    stages: tuple[StageSection, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _stages_give_the_steps(cls, settings: Any) -> Any:
        return complete_training(settings) if isinstance(settings, Mapping) else settings

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
        if self.stages:
            return self
        warmup, decay = self.optimizer.warmup_steps, self.optimizer.decay_steps
        if warmup >= self.optimizer.steps_of_decay(self.training.steps):
            end = f"training.steps = {self.training.steps}" if decay is None else f"optimizer.decay_steps = {decay}"
            if decay is None and (start := self.optimizer.schedule_start):
                end = f"the {self.training.steps - start} steps after optimizer.schedule_start = {start}"
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
        if others := [layer for layer in drawn if kinds[layer] not in ROUTED_KINDS]:
            raise ValueError(
                f"logging.heat_map_layers = {drawn} names {others[0]}, a {kinds[others[0]]} layer: "
                f"it has no routing, name layers of kind {' or '.join(ROUTED_KINDS)}"
            )
        return self

    @model_validator(mode="after")
    def _documents_fit(self) -> "RunConfig":
        if self.stages:
            return self
        if self.data.documents == "separate":
            check_separate(
                sequence_length=self.training.sequence_length,
                micro_batch_size=self.training.micro_batch_size,
                chunk_size=self.attention.chunk_size,
            )
        return self

    @model_validator(mode="after")
    def _evaluation_fits(self) -> "RunConfig":
        if self.stages:
            return self
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
        read = set(SourceConfig.model_fields) - {"length_weights"}
        trained_on = [one.model_dump(include=read) for one in self.data.all_sources]
        for source in heldout.all_sources:
            same = source.model_dump(include=read) in trained_on
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
        check_offload(self.optimizer, self.parallel, self.engine)
        if self.engine == "deepspeed":
            check_engine(self.parallel, self.deepspeed)
            if self.attention.conversion is not None:
                raise ValueError(
                    f"attention.conversion is {self.attention.conversion}, and engine: deepspeed trains by the loss of "
                    "the model only: set engine to megatron"
                )
            if "nsa" in self.attention.pattern and self.deepspeed.settings().zero_optimization.stage == 3:
                raise ValueError(
                    "attention.kind has nsa layers, and ZeRO stage 3 has taken their weights apart when the backward "
                    "pass of their compression begins: set deepspeed.zero_stage to 1 or 2, or engine to megatron"
                )
        if self.attention.conversion is not None and not self.stages:
            self.trainable.check_conversion()
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "RunConfig":
        if not self.stages:
            self.check_world_size(self.model_ranks)
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "RunConfig":
        if not self.stages:
            return self
        names = [stage.name for stage in self.stages]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"stages: {repeated[0]} is the name of two stages: name each once")
        if self.run.resume not in ("auto", "never"):
            raise ValueError(
                f"run.resume = {self.run.resume} with stages, whose steps count from 0: export that checkpoint and "
                "set model.weights to the folder"
            )
        stages = self.stage_list
        for stage in stages:
            if stage.gate.heldout_loss is not None and stage.config.evaluation.interval is None:
                raise ValueError(
                    f"stage {stage.name} has gate.heldout_loss = {stage.gate.heldout_loss:g} and no evaluation: set "
                    "evaluation.interval and evaluation.data"
                )
        check_adapters([(stage.name, stage.config.trainable.lora) for stage in stages])
        steps = stages[-1].last_step
        if self.training.steps != steps:
            raise ValueError(
                f"training.steps = {self.training.steps}, and the stages have {steps} steps: drop training.steps"
            )
        return self

    @property
    def model_ranks(self) -> int:
        """Processes of one replica of the model: tensor x context x pipeline, the most that a stage has."""
        parts = [stage.config.parallel for stage in self.stage_list]
        return math.lcm(*(one.tensor * one.context * one.pipeline for one in parts))

    @property
    def stage_list(self) -> "tuple[Stage, ...]":
        """The stages in order; without `stages` the run is one, whose name is empty.

        Raises ValidationError for a stage whose settings are refused.
        """
        if not self.stages:
            return (Stage(0, "", 0, self),)
        base = self.model_dump(exclude_unset=True, exclude={"stages"})
        found: list[Stage] = []
        problems: list[InitErrorDetails] = []
        first_step = 0
        for number, (section, settings) in enumerate(zip(self.stages, stage_settings(base, self.stages), strict=True)):
            try:
                config = RunConfig.model_validate(settings, strict=True)
            except ValidationError as error:
                problems += _within(("stages", number), error)
                continue
            found.append(Stage(number, section.name, first_step, config, section.gate))
            first_step = config.training.steps
        if problems:
            raise ValidationError.from_exception_data("RunConfig", problems)
        return tuple(found)

    def stage_at(self, step: int) -> "Stage":
        """Return the stage of the step after `step`; after the last step, the last stage."""
        stages = self.stage_list
        return next((stage for stage in stages if step < stage.last_step), stages[-1])

    @property
    def all_data(self) -> list[DataConfig]:
        """The documents of every stage, and those that are held out, each once."""
        found: list[DataConfig] = []
        for stage in self.stage_list:
            heldout = stage.config.evaluation
            for data in (stage.config.data, None if heldout.interval is None else heldout.data):
                if data is not None and data not in found:
                    found.append(data)
        return found

    def tokens_of_steps(self, steps: int) -> int:
        """Return the tokens of the first `steps` global batches, padding included."""
        return sum(
            max(0, min(steps, stage.last_step) - stage.first_step) * stage.config.training.tokens_per_step
            for stage in self.stage_list
        )

    def going_on(self) -> "RunConfig":
        """Return the configuration of later attempts, which resume from the checkpoints of earlier ones."""
        if self.run.resume != "never":
            return self
        return self.model_copy(update={"run": self.run.model_copy(update={"resume": "auto"})})

    def check_world_size(self, world_size: int) -> None:
        """Refuse, with ValueError, a number of processes that this configuration cannot run on."""
        if self.stages:
            for stage in self.stage_list:
                try:
                    stage.config.check_world_size(world_size)
                except ValueError as error:
                    raise ValueError(f"stage {stage.name}: {error}") from None
            return
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


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        number: counts from 0.
        name: empty where the run has no stages.
        first_step: steps of the stages before.
        config: settings of the run during this stage; training.steps is `last_step`.
        gate: conditions at its end.
    """

    number: int
    name: str
    first_step: int
    config: RunConfig
    gate: GateSection = field(default_factory=GateSection)

    @property
    def last_step(self) -> int:
        """Steps of the stages up to the end of this one."""
        return self.config.training.steps


def _within(place: tuple[str | int, ...], error: ValidationError) -> list[InitErrorDetails]:
    """Return the problems of `error` as problems of the settings at `place`."""
    return [
        InitErrorDetails(
            type=PydanticCustomError("value_error", "{reason}", {"reason": found["msg"]})
            if found["type"] == "value_error"
            else found["type"],
            loc=(*place, *found["loc"]),
            input=found["input"],
            ctx=found.get("ctx", {}),
        )
        for found in error.errors(include_url=False)
    ]


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair, of a caller in Python
        return False
    return True
