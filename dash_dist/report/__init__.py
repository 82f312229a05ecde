"""One HTML page that says how a run went, from the files in its folder; needs nothing else, and loads nothing.

record.py    what the files say
health.py    what to think of it
figures.py   the curves as SVG
page.py      the page
"""

from pathlib import Path

from dash_dist.report.page import render
from dash_dist.report.record import read_run
from dash_dist.run.files import replace_text

__all__ = ["write_report"]


def write_report(run_directory: Path, output: Path | None = None) -> Path:
    """Write the report of a finished or a running run; returns its path.

    Args:
        run_directory: `runs/NAME`.
        output: the HTML file; by default `report.html` in the folder of the run.

    Raises:
        ConfigError: the extra `report` is not installed.
        RunError: the folder is not that of a run, or a file of it, or the report, cannot be read or written.
    """
    from dash_dist.errors import RunError
    from dash_dist.extras import require_extra

    require_extra("report", "dash-dist report")
    record = read_run(run_directory)
    output = output or run_directory / "report.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, render(record))
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror or error}: name another file with --output") from error
    return output
