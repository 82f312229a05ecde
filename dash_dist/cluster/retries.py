"""Decision to restart a failed run, and the pause before it.

Knows steps and counts; does not know causes.
"""


class Retries:
    """Counter of failures in a row without a new checkpoint.

    A run of weeks loses many nodes: an attempt that saved a new step before it failed resets the count. Several
    attempts in a row that saved none point to a fault that restarting does not remove.

    Args:
        most: failures in a row without a new checkpoint that are followed by another attempt; 0: never restart.
        saved_step: of the newest checkpoint before the first attempt; 0 for none.
    """

    def __init__(self, most: int, *, saved_step: int) -> None:
        self._most = most
        self._saved_step = saved_step
        self._in_a_row = 0

    @property
    def in_a_row(self) -> int:
        """Failures so far since the newest checkpoint."""
        return self._in_a_row

    def pause_after_failure(self, saved_step: int, *, trained: bool = True) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up.

        Args:
            saved_step: of the newest checkpoint after the failed attempt; 0 for none.
            trained: False for an attempt that failed before training: a newer checkpoint is then another run's.
        """
        self._in_a_row = 0 if trained and saved_step > self._saved_step else self._in_a_row + 1
        self._saved_step = saved_step  # also a lower one: a checkpoint may have been set aside as damaged
        if self._most == 0 or self._in_a_row > self._most:
            return None
        return min(60.0, 2.0**self._in_a_row)
