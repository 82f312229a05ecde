"""The parts of a step as lines of text.

Knows columns. Does not know where the numbers come from.
"""

from __future__ import annotations

from dash_dist.run.profile import Profile, rows_of


def table_of(profile: Profile) -> str:
    """Return the table of the parts, the gaps and the whole step. A narrow terminal folds its lines, and cuts none."""
    rows = rows_of(profile)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    title, *numbers = row
    return [title.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
