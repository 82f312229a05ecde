"""Values of the columns of a row, and the error for a document that cannot be read.

Knows rows as JSON and tables give them; does not know files.
"""

import json
from dataclasses import dataclass
from typing import Any


class DamagedDocument(Exception):
    """A document cannot be read; the message gives the reason."""


@dataclass(frozen=True)
class Columns:
    """Columns that are read together. `data.name` is the field name of the column data.

    Attributes:
        optional: names that may be missing.
        of_text: all of them hold text.
    """

    names: tuple[str, ...]
    optional: tuple[str, ...] = ()
    of_text: bool = True


def fields_of_line(line: bytes) -> dict[str, Any]:
    """Return the object that a line of JSON holds. Raises DamagedDocument if it holds none."""
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedDocument(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DamagedDocument(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedDocument("not a JSON object")
    return value


def missing_at(fields: dict[str, Any], column: str) -> object:
    """Return what there is in place of a column that is missing, None if it is there."""
    value: Any = fields
    for key in [column] if column in fields else column.split("."):
        if not isinstance(value, dict) or key not in value:
            return sorted(value) if isinstance(value, dict) else type(value).__name__
        value = value[key]
    return None


def value_of(fields: dict[str, Any], column: str) -> Any:
    """Return the value of a column, None if it is missing."""
    value: Any = fields
    for key in [column] if column in fields else column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def text_of(value: object, column: str) -> str:
    """Return the text that a column holds, "" for null. Raises DamagedDocument if it is none."""
    if value is None:
        return ""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if not isinstance(value, str):
            raise DamagedDocument(f"column {column!r} holds {type(value).__name__}, not text")
        # JSON can spell half of a surrogate pair ("\ud800"), which is a str but no text.
        value.encode("utf-8")
    except UnicodeError as error:
        raise DamagedDocument(str(error)) from error
    return value
