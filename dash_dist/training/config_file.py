"""From a YAML file and `key=value` overrides to a RunConfig, and back to YAML; every refusal in words.

Knows YAML and how to explain what pydantic found; does not know what the settings mean.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dash_dist.training.config import RunConfig
from dash_dist.training.errors import ConfigError

_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)=(?P<value>.*)", re.DOTALL)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run configuration at `path`, replace settings by `overrides`, and validate the whole.

    Args:
        path: YAML file with the sections of RunConfig.
        overrides: "section.key=value" each; the value is YAML, so `3`, `1e-4`, `true`, `null` and `[a, b]`
            have their types.

    Raises ConfigError that names every refused key, the value given, and what is allowed.
    """
    settings = _read(Path(path))
    for override in overrides:
        _apply(settings, override)
    try:
        # strict: "4" is not 4, and true is not 1.
        return RunConfig.model_validate(settings, strict=True)
    except ValidationError as error:
        problems = [_explain(one) for one in error.errors()]
        raise ConfigError("\n".join([f"the configuration {path} is refused:", *problems])) from None


def to_yaml(config: RunConfig) -> str:
    """`config` with every default filled in; `load_config` reads it back as an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that 1e-3 is a number, a list a tuple, and a key given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return mapping


def _construct_tuple(loader: _Loader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:seq", _construct_tuple)
# PyYAML follows YAML 1.1, where an exponent needs a point and a sign; people write 1e-3 and 3e8.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
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
        raise ConfigError(f"override {override!r} is not section.key=value, such as training.steps=20")
    if not match["value"]:
        raise ConfigError(f"override {override!r} has no value: write {match['key']}=null to unset it")
    try:
        value = yaml.load(match["value"], _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *sections, leaf = match["key"].split(".")
    place = settings
    for index, section in enumerate(sections):
        inner = place.setdefault(section, {})
        if inner is None:  # a section named in the file with nothing below it
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(sections[: index + 1])} is {_shown(inner)}, "
                f"which has no settings of its own"
            )
        place = inner
    place[leaf] = value


def _explain(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"  {key} = {_shown(error['input'])}: there is no such setting{_suggestion(key)}"
        case "missing":
            return f"  {key}: must be set"
    # A validator of ours says all that is needed itself.
    reason = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):
        return f"  {reason}" if not key or reason.startswith(f"{key}.") else f"  {key}: {reason}"
    return f"  {key} = {_shown(error['input'])}: {reason[0].lower() + reason[1:]}"


def _suggestion(key: str) -> str:
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
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
