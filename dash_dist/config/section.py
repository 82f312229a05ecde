"""Base of every section of a run's configuration, and arithmetic for its error messages.

Knows how unknown keys are refused; does not know individual settings.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A closed, frozen group of settings; numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def next_multiple(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def divisors(value: int) -> list[int]:
    """Return the divisors of `value` up to 1024, as candidates for a message."""
    return [candidate for candidate in range(1, min(value, 1024) + 1) if value % candidate == 0]
