"""Requests to a rank to fail inside a part of a step.

Knows the files that the ranks' hook reads and writes; does not know which rank should fail, nor when.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

Part = Literal["forward", "backward", "exchange", "optimizer", "save"]
Failure = Literal["killed", "out_of_memory"]


class RankRequests:
    """Requests in `folder`, the output folder of the ranks' hook; one at a time."""

    def __init__(self, folder: Path) -> None:
        self._request = folder / "request.json"
        self._obeyed = folder / "obeyed.json"

    def ask(self, rank: int, part: Part, failure: Failure) -> None:
        """Ask `rank` to fail the next time it is in `part`."""
        self._obeyed.unlink(missing_ok=True)
        written = self._request.with_suffix(".written")
        written.write_text(json.dumps({"rank": rank, "part": part, "failure": failure}))
        written.rename(self._request)  # at once: a rank may look for it at any moment

    def obeyed_at(self) -> float | None:
        """Return the time of the failure in seconds since 1970; None before it."""
        try:
            return float(json.loads(self._obeyed.read_text())["time"])
        except FileNotFoundError:
            return None
