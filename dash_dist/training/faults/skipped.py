"""Record of skipped batches, kept over rollbacks and restarts.

Knows step numbers and one file; does not know why a batch is skipped. A run that resumes from an older checkpoint
reads the same batches again, and must skip the same ones.

    <run directory>/skipped_batches.json      rollbacks so far; per entry the steps, the reason, and the position in the
                                              data before the first of them, from which its batch can be read again
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dash_dist.run.files import read_json, replace_json


@dataclass(frozen=True)
class SkippedBatches:
    """Steps `first` to `last`, both included. `position` is a merged data stream state, None where it is not known."""

    first: int
    last: int
    reason: str
    position: dict[str, Any] | None = None


class SkipRecord:
    """Skipped batches and rollbacks of a run. Every rank holds one; rank 0's is written.

    Attributes:
        rollbacks: count over all attempts.
        batches: in the order in which they were skipped.
    """

    FILE = "skipped_batches.json"

    def __init__(self, rollbacks: int = 0, batches: list[SkippedBatches] | None = None) -> None:
        self.rollbacks = rollbacks
        self.batches = batches or []

    def __contains__(self, step: int) -> bool:
        return any(one.first <= step <= one.last for one in self.batches)

    def write(self, run_directory: Path) -> None:
        """Raises OSError."""
        value = {"rollbacks": self.rollbacks, "batches": [asdict(one) for one in self.batches]}
        replace_json(run_directory / self.FILE, value)

    @classmethod
    def read(cls, run_directory: Path) -> "SkipRecord":
        """Return the record of the run, an empty one if it has none. Raises OSError; ValueError names a bad file."""
        path = run_directory / cls.FILE
        try:
            value = read_json(path)
            if value is None:
                return cls()
            return cls(int(value["rollbacks"]), [SkippedBatches(**one) for one in value["batches"]])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it, and the batches it names are trained on again"
            ) from None
