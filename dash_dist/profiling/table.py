"""The parts of a step as a table, for the console and for the report.

Knows how numbers are written. Does not know where they come from.
"""

from __future__ import annotations

from rich.table import Table

from dash_dist.run.profile import Profile, rows_of


def table_of(profile: Profile) -> Table:
    """Return the table of the parts, the gaps and the whole step."""
    table = Table(box=None, pad_edge=False)
    head, *rows = rows_of(profile)
    for place, title in enumerate(head):
        table.add_column(title, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table
