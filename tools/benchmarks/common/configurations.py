"""Configurations of a benchmark's runs: what all have in common, changed for one, and written to a file.

Knows sections and files; does not know settings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def changed(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `settings` whose sections have the keys of `changes`; what is no section is replaced."""
    merged = copy.deepcopy(settings)
    for key, value in changes.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


def run_section(title: str, folder: Path) -> dict[str, str]:
    """Return the section `run` of a case with this title, whose runs are in `folder`."""
    return {"name": title.replace(", ", "_").replace(" ", "_"), "directory": str(folder / "runs")}


def write_configuration(settings: dict[str, Any], folder: Path) -> Path:
    """Write a configuration into `folder`, named after its run; returns the file."""
    path = folder / f"{settings['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
