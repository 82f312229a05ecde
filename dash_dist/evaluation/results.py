"""The file of an evaluation's results: JSON that is whole at any time, and that a later evaluation completes.

Knows groups and settings; does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dash_dist.errors import ConfigError
from dash_dist.evaluation.groups import DEPTH_BINS, Group, accuracy_by_depth
from dash_dist.run.files import read_json, replace_json

_FORMAT = 1
_GROUP = TypeAdapter(Group)


class ResultFile:
    """Groups that have been evaluated with the same settings.

    Args:
        path: of the file; its folder is created.
        settings: everything that results depend on, as JSON.
        circumstances: everything else, as JSON: versions, devices.
    """

    def __init__(self, path: Path, settings: dict[str, Any], circumstances: dict[str, Any]) -> None:
        self._path, self._settings, self._circumstances = path, settings, circumstances

    def read(self) -> list[Group]:
        """Return the groups of an earlier evaluation; none without a file.

        Raises:
            ConfigError: the file is another one, damaged, or of other settings; names the first that differs.
        """
        remedy = "give another file with --output, or remove this one"
        try:
            content = read_json(self._path)
            if content is None:
                return []
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, and this version reads {_FORMAT}")
            groups = [_group(one) for one in content["groups"]]
            saved = content["settings"]
            names = sorted(self._settings.keys() | saved.keys())
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = "" if isinstance(error, ValidationError | KeyError) else f" ({error})"
            raise ConfigError(f"{self._path} holds no results of an evaluation{reason}: {remedy}") from error
        for name in names:
            if (before := saved.get(name)) != (now := self._settings.get(name)):
                raise ConfigError(f"{self._path} has results with {name} = {before}, and here it is {now}: {remedy}")
        return groups

    def write(self, groups: Sequence[Group]) -> None:
        """Replace the file. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": _FORMAT,
            "settings": self._settings,
            **self._circumstances,
            "groups": [_content(group) for group in groups],
        }
        replace_json(self._path, content)


def _content(group: Group) -> dict[str, Any]:
    content = asdict(group)
    for one, sample in zip(content["samples"], group.samples, strict=True):
        one["score"] = sample.score
    samples = content.pop("samples")
    return {
        **content,
        "accuracy": group.accuracy,
        "count": len(group.samples),
        "accuracy_by_depth": {
            f"{number / DEPTH_BINS:g}-{(number + 1) / DEPTH_BINS:g}": accuracy
            for number, accuracy in accuracy_by_depth(group.samples).items()
        },
        "samples": samples,
    }


def _group(content: dict[str, Any]) -> Group:
    derived = ("accuracy", "count", "accuracy_by_depth")
    known = {name: value for name, value in content.items() if name not in derived}
    return _GROUP.validate_python(known)
