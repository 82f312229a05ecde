"""The list `stages:`, consecutive parts of a run with their own settings.

Knows how a stage changes the settings of the run; does not know their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dash_dist.config.evaluation import TAKEN_OVER
from dash_dist.config.section import Section

Settings = dict[str, Any]

_MODEL = ("rotary_base", "positions")
_OF_RUN = {
    "training": ("distributed_timeout_seconds",),
    "checkpoint": ("keep", "keep_every_hours", "asynchronous"),
    "faults": ("hang_timeout_seconds",),
    "parallel": ("distributed_optimizer",),
}
"""Settings that hold for a whole run."""
_DATA = ("tokenizer", "end_of_document", "special_tokens", "cache")


class GateSection(Section):
    """Conditions at the end of a stage. A run that misses one ends with an error and keeps its checkpoint."""

    heldout_loss: float | None = Field(
        default=None, gt=0.0, description="largest loss on the held-out sequences, in nats; needs evaluation.interval"
    )
    retrieval: float | None = Field(
        default=None, gt=0.0, le=1.0, description="least accuracy in the suite retrieval at the stage's sequence length"
    )

    @property
    def is_set(self) -> bool:
        """True if there is any condition."""
        return self != GateSection()


class StageSection(Section):
    """One stage: its length, and settings that replace those of the run during it.

    A section here has the keys of the run's section of that name. Each key replaces the run's, with all that is below
    it; what is not named stays as in the run, not as in the stage before.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$", description="for messages, events and checkpoints")
    steps: int | None = Field(default=None, gt=0, description="optimizer steps of the stage")
    tokens: int | None = Field(
        default=None, gt=0, description="tokens of the stage, padding included, in place of steps; rounded up to steps"
    )
    schedule: Literal["restart", "continue"] = Field(
        default="restart",
        description="restart: the learning rate's warmup and decay are of this stage; continue: of the whole run",
    )
    gate: GateSection = Field(default_factory=GateSection)
    model: Settings = Field(default_factory=dict)
    attention: Settings = Field(default_factory=dict)
    trainable: Settings = Field(default_factory=dict)
    parallel: Settings = Field(default_factory=dict)
    data: Settings = Field(default_factory=dict)
    optimizer: Settings = Field(default_factory=dict)
    training: Settings = Field(default_factory=dict)
    evaluation: Settings = Field(default_factory=dict)
    checkpoint: Settings = Field(default_factory=dict)
    logging: Settings = Field(default_factory=dict)
    faults: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            given = "neither steps nor tokens" if self.steps is None else "both steps and tokens"
            raise ValueError(f"stage {self.name} has {given}: give one of them")
        return self

    @model_validator(mode="after")
    def _changes_what_may_change(self) -> Self:
        if "steps" in self.training:
            raise ValueError(f"stage {self.name} sets training.steps: set `steps` of the stage itself")
        for section, names, reason in (
            ("model", self.model.keys() - set(_MODEL), f"weights carry over: only {' and '.join(_MODEL)} may change"),
            ("optimizer", self.optimizer.keys() & {"schedule_start"}, "the stage's `schedule` says where it begins"),
            *(
                (section, getattr(self, section).keys() & set(names), "it holds for all stages: set it for the run")
                for section, names in _OF_RUN.items()
            ),
            ("data", self.data.keys() & set(_DATA), "the model reads the same tokens in every stage: set it in `data`"),
        ):
            if names:
                raise ValueError(f"stage {self.name} sets {section}.{min(names)}; {reason}")
        return self

    @property
    def overrides(self) -> dict[str, Settings]:
        """The sections that replace settings of the run, by name."""
        return {
            name: dict(section)
            for name in type(self).model_fields
            if isinstance(section := getattr(self, name), Mapping) and section
        }


def complete_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` of a run with training.steps, the sum of its stages, and the longest sequence where not given.

    Settings that cannot be understood are left for the validation to refuse.
    """
    stages, training = settings.get("stages"), settings.get("training", {})
    if not isinstance(stages, list | tuple) or not stages or not isinstance(training, Mapping):
        return dict(settings)
    of_stages = [
        {**training, **(stage.get("training") or {})}
        for stage in stages
        if isinstance(stage, Mapping) and isinstance(stage.get("training") or {}, Mapping)
    ]
    lengths = [length for one in of_stages if isinstance(length := one.get("sequence_length"), int)]
    filled = dict(training)
    if lengths and len(lengths) == len(stages):
        filled.setdefault("sequence_length", max(lengths))
    pairs = zip(stages, of_stages, strict=True) if len(of_stages) == len(stages) else ()
    steps = [number for pair in pairs if isinstance(number := _steps(*pair), int)]
    filled.setdefault("steps", sum(steps) or 1)  # where a stage's are not known, the stage is refused
    return {**settings, "training": filled}


def stage_settings(base: Mapping[str, Any], stages: Sequence[StageSection]) -> list[dict[str, Any]]:
    """Return the settings of a run of each stage, which begins at the step where the one before ends.

    Args:
        base: settings of the run, without `stages`. training.steps is ignored.
    """
    found = []
    first_step = 0
    for stage in stages:
        overrides = stage.overrides
        settings = {**base, **{name: {**base.get(name, {}), **changed} for name, changed in overrides.items()}}
        heldout = settings.get("evaluation", {}).get("data")
        if heldout and "data" not in overrides.get("evaluation", {}):
            follow = {name: value for name, value in overrides.get("data", {}).items() if name in TAKEN_OVER}
            settings["evaluation"] = {**settings["evaluation"], "data": {**heldout, **follow}}
        training = dict(settings["training"])
        last_step = first_step + (_steps({"steps": stage.steps, "tokens": stage.tokens}, training) or 0)
        settings["training"] = {**training, "steps": last_step}
        optimizer = dict(settings["optimizer"])
        if stage.schedule == "restart":
            optimizer["schedule_start"] = first_step
        elif optimizer.get("decay_steps") is None:
            optimizer["decay_steps"] = base["training"]["steps"]
        settings["optimizer"] = optimizer
        if warmup := overrides.get("attention", {}).get("routing_warmup"):
            settings["attention"]["routing_warmup"] = {"begins_after": first_step, **warmup}
        found.append(settings)
        first_step = last_step
    return found


def _steps(stage: Mapping[str, Any], training: Mapping[str, Any]) -> int | None:
    """Return the steps of a stage; None where its numbers make no sense."""
    if (tokens := stage.get("tokens")) is None:
        return stage.get("steps")
    batch, length = training.get("global_batch_size", 1), training.get("sequence_length")
    if all(isinstance(size, int) and size > 0 for size in (tokens, batch, length)):
        return -(-tokens // (batch * length))
    return None
