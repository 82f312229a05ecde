"""Small files that are whole whenever they are read.

Knows how a file is written and replaced; does not know its content.
"""

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`, on disk when this returns. Raises OSError, which leaves the old file.

    A reader, or a process started after a crash, sees the old or the new text.
    """
    partial = path.with_name(f".{path.name}.partial")
    _write(partial, text)
    os.replace(partial, path)


def replace_json(path: Path, value: Any) -> None:
    """Replace the file at `path` by `value` as JSON, as `replace_text` does. Raises OSError."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a file that no reader looks for yet, such as one in a hidden folder. On disk when this returns.

    Raises OSError.
    """
    _write(path, json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """Return the value that `replace_json` wrote; None without a file. Raises OSError; ValueError for invalid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
