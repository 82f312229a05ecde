"""Texts of which only the answers count in the loss, as conversations.

Knows the rows `messages` of the data section; does not know what is asked.
"""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
"""The texts of the turns one after another, and nothing between them."""
_COPIED = string.ascii_letters + string.digits + " "
_LEAST_COPIED = 10


class Turn(NamedTuple):
    """A text that ends with a question, and its answer."""

    question: str
    answer: str


def as_messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """Return the turns as the value of a row."""
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn.question), ("assistant", turn.answer))
    ]


def as_row(messages: list[dict[str, str]]) -> str:
    """Return the line of a file of conversations."""
    return json.dumps({"messages": messages}) + "\n"


def copies(rng: random.Random, count: int, length: int) -> Iterator[Turn]:
    """Yield texts that come again and again, to be predicted from the second time on.

    A model that can copy can learn to look up a fact.

    Args:
        length: tokens of a document, its end included.
    """
    for _ in range(count):
        symbols = rng.choices(_COPIED, k=rng.randint(_LEAST_COPIED, length // 2))
        text = "".join(itertools.islice(itertools.cycle(symbols), length - 1))
        yield Turn(text[: len(symbols)], text[len(symbols) :])


def source(label: str, paths: Iterable[Path], template: Path) -> dict[str, Any]:
    """Return an entry of `data.sources`.

    Args:
        template: file that `write_template` has written.
    """
    return {"label": label, "paths": [str(path) for path in paths], "rows": "messages", "chat_template": str(template)}


def write_template(path: Path) -> None:
    """Write the chat template of the rows."""
    path.write_text(_TEMPLATE)
