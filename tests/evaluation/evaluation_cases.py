"""Predictors that need no model, and readers that answer questions from their text alone.

Knows the wording of the tasks; does not know Megatron-core, which it never imports.
"""

import contextlib
import hashlib
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch

from dash_dist.data.tokenizer import ByteTokenizer


class Alone:
    """The control group of one rank."""

    def together(self, what, error_type):
        return contextlib.nullcontext()


class FakePredictor:
    """A predictor whose next token is a function of all tokens so far: `next_token(prefix)`."""

    def __init__(self, next_token, *, density=0.25):
        self._next_token = next_token
        self.calls = []
        self.routing_was_recorded = []
        self.telemetry = SimpleNamespace(
            record_routing=False, routing_statistics=lambda: [SimpleNamespace(density=density)] * 2
        )

    def next_tokens(self, tokens, positions):
        assert tokens.dtype == positions.dtype == torch.int64
        self.calls.append(tuple(positions.shape))
        self.routing_was_recorded.append(self.telemetry.record_routing)
        found = [
            [self._next_token(row[: place + 1].numpy()) for place in places.tolist()]
            for row, places in zip(tokens, positions, strict=True)
        ]
        return torch.tensor(found)


def hashed(vocab_size):
    """A next token that any change of the prefix changes."""

    def next_token(prefix):
        digest = hashlib.sha256(np.ascontiguousarray(prefix)).digest()
        return int.from_bytes(digest[:4], "big") % vocab_size

    return next_token


def reading(answer):
    """A next token of bytes that continues a prompt by `answer(prompt)`, and then by zeros."""

    def next_token(prefix):
        text = ByteTokenizer().decode(prefix)
        prompt, colon, given = _split(text)
        right = answer(prompt + colon)
        return ord(right[len(given)]) if len(given) < len(right) else 0

    return next_token


def _split(text):
    before, line = text.rsplit("\n", 1)
    match = re.match(r"(The number of \w+ is|[^:]*:)(.*)", line, re.DOTALL)
    return before + "\n", match[1], match[2]


def solve(text):
    """Answer the question at the end of `text` by reading it, without knowing how the text was made."""
    body, question = text.rsplit("\n", 1)
    if match := re.fullmatch(r"The number of (\w+) is", question):
        return " " + re.findall(rf"The number of {match[1]} is (\d+)\.", body)[0]
    if match := re.fullmatch(r"The 4 numbers of (\w+), from first to last:", question):
        return " " + ", ".join(re.findall(rf"A number of {match[1]} is (\d+)\.", body))
    if match := re.fullmatch(r"The numbers of (.*), in this order:", question):
        found = [re.findall(rf"The number of {name} is (\d+)\.", body)[0] for name in match[1].split(", ")]
        return " " + ", ".join(found)
    if match := re.fullmatch(r"The 5 names with the value (\d+), from first to last:", question):
        names = [match[1]]
        for name, source in re.findall(r"Let (\w+) be (\w+)\.", body):
            if source in names:
                names.append(name)
        return " " + ", ".join(names[1:])
    count = int(re.match(r"The (\d) words that occur most often", question)[1])
    words = re.findall(r"\w+", body.split("A list of words:\n")[1])
    return " " + ", ".join(word for word, _ in Counter(words).most_common(count))
