"""Folders that `dash-dist import` wrote, as a benchmark takes them. Knows their files; does not know runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_imported(weights: Path) -> tuple[dict[str, Any], str | None]:
    """Return the section `model` of a folder's configuration, and its tokenizer, if it has one.

    Raises:
        ValueError: it is no such folder.
    """
    path = weights / "model.yaml"
    if not path.is_file():
        raise ValueError(f"{path} is not there: give a folder that `dash-dist import` wrote")
    described = yaml.safe_load(path.read_text())
    return described["model"], described.get("data", {}).get("tokenizer")
