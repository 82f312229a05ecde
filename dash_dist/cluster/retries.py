"""When a run that failed is started again, and how soon.

Knows steps and counts; does not know what failed.
"""


class Retries:
    """The failures of a run that brought it nothing, in a row.

    An attempt that saved a new step before it failed is no reason to give up: a run of weeks loses many nodes. One
    that saved none is, when it happens often enough: then something is wrong that trying again does not mend.

    Args:
        most: attempts in a row that may fail without a new checkpoint and be followed by another; 0: never start again.
        saved_step: of the newest checkpoint before the first attempt; 0 for none.
    """

    def __init__(self, most: int, *, saved_step: int) -> None:
        self._most = most
        self._saved_step = saved_step
        self._in_a_row = 0

    @property
    def in_a_row(self) -> int:
        """Attempts that failed one after the other without a new checkpoint."""
        return self._in_a_row

    def pause_after_failure(self, saved_step: int, *, trained: bool = True) -> float | None:
        """Seconds to wait before the next attempt, None to give up.

        Args:
            saved_step: of the newest checkpoint after the failed attempt; 0 for none.
            trained: whether the attempt came so far; if not, a newer checkpoint is another run's.
        """
        self._in_a_row = 0 if trained and saved_step > self._saved_step else self._in_a_row + 1
        self._saved_step = saved_step  # also a lower one: a checkpoint may have been set aside as damaged
        if self._most == 0 or self._in_a_row > self._most:
            return None
        return min(60.0, 2.0**self._in_a_row)
