"""A study of two models in a process of its own: stopped within a training, out of time, run to its end, run again.

    python -m tests.tools.study_job FOLDER

Results are in FOLDER/out. Prints the output of the commands.
"""

import sys
from pathlib import Path

from typer.testing import CliRunner

from dash_dist.run.requests import Command, Request
from tools.study.__main__ import app
from tools.study.cells import measure
from tools.study.deadline import Deadline, OutOfTime
from tools.study.parts import Cell
from tools.study.sizes import SIZES


class DeadlineOfPolls(Deadline):
    """A deadline after some polls of a training."""

    def __init__(self, polls: int) -> None:
        super().__init__(None)
        self._left = polls

    def command(self) -> Command:
        self._left -= 1
        return Command(Request.STOP if self._left < 0 else Request.GO_ON)


def main(folder: Path) -> None:
    try:
        cell, deadline = Cell("missing", "missing", "dash-1", 0), DeadlineOfPolls(2)
        measure(cell, size=SIZES["cpu"], folder=folder / "work", deadline=deadline, jobs=1)
    except OutOfTime:
        print("stopped")
    command = [
        "run",
        "--out",
        str(folder / "out"),
        "--folder",
        str(folder / "work"),
        "--size",
        "cpu",
        "--seeds",
        "1",
        "--jobs",
        "2",
    ]
    command += ["--part", "missing", "--method", "dash-1", "--method", "nsa-6"]
    for options in (["--seconds", "1"], [], []):
        called = CliRunner().invoke(app, command + options)
        if called.exception is not None:
            raise called.exception
        print(called.output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
