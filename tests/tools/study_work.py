"""Work for jobs of the study in place of a training: what the processes need, without the slow libraries.

Knows processes and files; does not know models.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dash_dist.errors import RunError
from dash_dist.training.stopping import StopSignal
from tools.study.deadline import OutOfTime
from tools.study.parts import Cell
from tools.study.results import Record

_PATIENCE = 60.0


def meet(cell: Cell, *, folder: Path, together: int) -> Record:
    """Wait until so many cells are at it together; the record has the GPU."""
    (folder / cell.title).touch()
    _wait(lambda: len(list(folder.iterdir())) >= together)
    print(f"{cell.title} met the others")
    return {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "curve": {"1": 0.1 + 0.2}}


def alone(cell: Cell, *, folder: Path) -> Record:
    """Raise FileExistsError where another cell of the same run is at work."""
    (folder / cell.run).mkdir()
    time.sleep(0.3)
    (folder / cell.run).rmdir()
    return {}


def fail(cell: Cell) -> Record:
    """Fail in the way that the method says."""
    match cell.method:
        case "refused":
            raise RunError("no such setting: give another")
        case "wrong":
            raise KeyError("loss")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "left":
            sys.exit(3)
    return {"method": cell.method}


def train(cell: Cell, *, folder: Path) -> Record:
    """Train until a signal, then save; the cell `first` sends the signal to the study once all are there."""
    with StopSignal() as stop:
        (folder / cell.method).touch()
        if cell.method == "first":
            _wait(lambda: len(list(folder.iterdir())) == 2)
            os.kill(os.getppid(), signal.SIGTERM)
        _wait(lambda: stop.requested)
        time.sleep(0.5)
        (folder / f"{cell.method} saved").touch()
    raise OutOfTime


def hang(cell: Cell, *, folder: Path) -> Record:
    """Never end, and leave a process behind; both have a file."""
    child = subprocess.Popen(["sleep", str(_PATIENCE)])
    for pid in (os.getpid(), child.pid):
        (folder / str(pid)).touch()
    time.sleep(_PATIENCE)
    return {}


def end(cell: Cell, *, folder: Path) -> Record:
    """Hang if the method says so; the other one ends once that hangs."""
    if cell.method == "hangs":
        return hang(cell, folder=folder)
    _wait(lambda: len(list(folder.iterdir())) == 2)
    return {}


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.02)
