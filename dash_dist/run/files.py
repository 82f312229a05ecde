"""Small files of a run that are replaced atomically.

Knows how a file is replaced; does not know its content.
"""

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`, which is on disk on return.

    A reader, or a process started after a crash, sees the old or the new text. Raises OSError, and keeps the old one.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def replace_json(path: Path, value: Any) -> None:
    """Replace the file at `path` by `value` as JSON, as `replace_text` does. Raises OSError."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return the value that `replace_json` wrote; None without a file. Raises OSError; ValueError for invalid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
