"""The process of one cell, started by `jobs`.

    python -m tools.study.job < TASK

Knows a pickled function and its cell, read from standard input; does not know how a cell is measured. Standard output
carries the answer alone, `{"record": ..., "error": ...}`: both are null if the cell has to be measured again. All that
is printed meanwhile goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
import traceback
from typing import Any

from dash_dist.errors import RunError
from tools.study.deadline import OutOfTime

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Entry point."""
    # As a stopped one, so that a training saves, if the study itself is killed.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        json.dump(_answer(), answer)


def _answer() -> dict[str, Any]:
    record = message = None
    try:
        work, cell = pickle.load(sys.stdin.buffer)
        record = work(cell)
    except OutOfTime:
        pass
    except Exception as error:
        traceback.print_exc()
        message = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
    return {"record": record, "error": message}


if __name__ == "__main__":
    main()
