"""Files of results: one for each cell, written once.

Knows files and their contents; does not know how a cell is measured. A cell's file holds everything that it was made
from, so results of several machines and days can be put into one folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.study.parts import Cell

Record = dict[str, Any]

_IDENTITY = ("size", "settings", "tests")
"""Entries of a record that make two results of one cell comparable."""


class OtherSettings(Exception):
    """A cell has a result of other settings than those asked for."""


class Results:
    """Results below a folder: PART/METHOD.seedN.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell."""
        return self._folder / cell.part / f"{cell.method}.seed{cell.seed}.json"

    def has(self, cell: Cell, identity: Mapping[str, Any]) -> bool:
        """Return whether a cell has a result.

        Args:
            identity: the entries `size`, `settings` and `tests` that its record would have.

        Raises:
            OtherSettings: its result has others.
        """
        path = self.path(cell)
        if not path.is_file():
            return False
        record = json.loads(path.read_text())
        asked = json.loads(json.dumps({name: identity[name] for name in _IDENTITY}))
        if different := [name for name in _IDENTITY if record.get(name) != asked[name]]:
            raise OtherSettings(
                f"{path} is a result of another {' and '.join(different)}: move it away, or give another --out"
            )
        return True

    def write(self, cell: Cell, record: Record) -> Path:
        """Write the result of a cell that has none. The file is whole or not there."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.rename(path)
        return path

    def __iter__(self) -> Iterator[Record]:
        """Yield all results, by part, method and seed."""
        records = [json.loads(path.read_text()) for path in sorted(self._folder.glob("*/*.json"))]
        return iter(sorted(records, key=lambda record: (record["part"], record["method"], record["seed"])))
