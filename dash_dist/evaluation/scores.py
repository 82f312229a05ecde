"""Scores of a continuation: the share of the expected parts that it has.

Knows texts; does not know tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def found_parts(expected: Sequence[str], given: str) -> tuple[bool, ...]:
    """Return which of the expected parts, whole words each, a continuation has.

    A single part must be the first word of the continuation; several may be anywhere in it, as RULER counts them.
    """
    if len(expected) == 1:
        return (re.match(rf"\s*{re.escape(expected[0])}(?!\w)", given) is not None,)
    return tuple(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", given) is not None for part in expected)
