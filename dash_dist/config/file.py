"""Conversion of a YAML file and `key=value` overrides to a RunConfig, and back to YAML.

Knows how to explain pydantic's errors; does not know the meaning of settings.
"""

import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dash_dist.config.run import RunConfig
from dash_dist.config.stages import StageSection
from dash_dist.config.yaml_reader import parse
from dash_dist.errors import ConfigError

_SHOWN_CHARACTERS = 60
_SHOWN_PROBLEMS = 20
_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+|engine)=(?P<value>.*)", re.DOTALL)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run configuration at `path`, replace settings by `overrides`, and validate the whole.

    Args:
        path: YAML file with the sections of RunConfig.
        overrides: strings "section.key=value". The value is YAML, so `3`, `1e-4`, `true`, `null` and `[a, b]` have
            their types.

    Raises:
        ConfigError: the message names refused keys, the values given and the allowed ones.
    """
    return _validated(_read(Path(path)), overrides, f"the configuration {path}")


def overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return `config` with settings replaced, as by `load_config`. Raises ConfigError."""
    return _validated(config.model_dump(exclude_unset=True), overrides, "the changed configuration")


def _validated(settings: dict[str, Any], overrides: Sequence[str], title: str) -> RunConfig:
    for override in overrides:
        _apply(settings, override)
        _check_reaches_stages(settings, override)
    try:
        # strict: "4" is not 4, and true is not 1.
        return RunConfig.model_validate(settings, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [_explain(one) for one in found[:_SHOWN_PROBLEMS]]
        if len(found) > _SHOWN_PROBLEMS:
            problems.append(f"  and {len(found) - _SHOWN_PROBLEMS} more")
        raise ConfigError("\n".join([f"{title} is refused:", *problems])) from None


def to_yaml(config: RunConfig) -> str:
    """Return `config` as YAML with every default filled in; `load_config` reads it back as an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path} holds {_shown(settings)}, not the sections of a run: {', '.join(RunConfig.model_fields)}"
        )
    return settings


def _apply(settings: dict[str, Any], override: str) -> None:
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f"override {_cut(repr(override))} is not section.key=value, such as training.steps=20")
    if not match["value"]:
        raise ConfigError(f"override {_cut(repr(override))} has no value: write {match['key']}=null to unset it")
    try:
        value = parse(match["value"])
    except yaml.YAMLError as error:
        raise ConfigError(f"override {_cut(repr(override))}: the value is not valid YAML: {error}") from None
    *sections, leaf = match["key"].split(".")
    place = settings
    for index, section in enumerate(sections):
        inner = place.get(section)
        if inner is None:  # not in the file, or with nothing below it
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {_cut(repr(override))}: {'.'.join(sections[: index + 1])} is {_shown(inner)}, "
                f"which has no settings of its own"
            )
        # A copy: with aliases, another section of the file may be the same object.
        place[section] = place = dict(inner)
    place[leaf] = value


def _check_reaches_stages(settings: dict[str, Any], override: str) -> None:
    """Refuse, with ConfigError, an override of a setting that a stage sets, which would stay as it is there."""
    section, _, key = override.partition("=")[0].partition(".")
    stages = settings.get("stages")
    for stage in stages if isinstance(stages, list | tuple) else ():
        replaced = stage.get(section) if isinstance(stage, dict) else None
        if isinstance(replaced, dict) and key.partition(".")[0] in replaced:
            raise ConfigError(
                f"override {_cut(repr(override))}: stage {stage.get('name')} sets {section}.{key.partition('.')[0]} "
                "itself: change it in the file"
            )


def _explain(error: ErrorDetails) -> str:
    key = _cut(".".join(str(part) for part in error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            return f"  {key} = {_shown(error['input'])}: there is no such setting{_suggestion(key)}"
        case "missing":
            return f"  {key}: must be set"
    # The message of a validator of ours is complete by itself.
    reason = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):
        return f"  {reason}" if not key or reason.startswith(f"{key}.") else f"  {key}: {reason}"
    return f"  {key} = {_shown(error['input'])}: {reason[0].lower() + reason[1:]}"


def _suggestion(key: str) -> str:
    stage = re.match(r"stages\.\d+\.", key)
    if stage and "." not in (key := key[stage.end() :]):
        return f"; a stage has {', '.join(StageSection.model_fields)}"
    known = list(_settings(RunConfig))
    section, _, leaf = key.rpartition(".")
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    elsewhere = [one for one in known if one.rpartition(".")[2] == leaf]
    close = [beside[one] for one in difflib.get_close_matches(leaf, beside, n=1)] or elsewhere
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {section or 'a run'} has {', '.join(beside)}" if beside else ""


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        optional = isinstance(field.annotation, types.UnionType)
        for annotation in get_args(field.annotation) if optional else (field.annotation,):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from _settings(annotation, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    """Return the beginning of `value` as JSON. The rest is not visited, because aliases can make it endless."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _SHOWN_CHARACTERS:
            break
    return _cut(text)


def _pieces(value: Any) -> Iterator[str]:
    match value:
        case dict():
            yield "{"
            for index, (key, inner) in enumerate(value.items()):
                yield ", " if index else ""
                yield from _pieces(key)
                yield ": "
                yield from _pieces(inner)
            yield "}"
        case list() | tuple():
            yield "["
            for index, inner in enumerate(value):
                yield ", " if index else ""
                yield from _pieces(inner)
            yield "]"
        case str():
            yield json.dumps(value[: _SHOWN_CHARACTERS + 1])
        case _:
            yield json.dumps(value, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
