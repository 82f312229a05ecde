"""Samples in tokens: questions that fill a length exactly.

Knows tokenizers and lengths; does not know models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dash_dist.data.tokenizer import Tokenizer
from dash_dist.evaluation.question import Question, evenly_spread
from dash_dist.evaluation.scores import found_parts
from dash_dist.evaluation.suites import TASKS
from dash_dist.evaluation.words import Filler


@dataclass(frozen=True)
class Sample:
    """One prompt with its right continuation; together they are exactly `length` tokens.

    Attributes:
        task: its name.
        index: from 0, in the samples of a task and a length.
        prompt: int64 [length - answer].
        answer: int64, right continuation as the tokenizer writes it.
        expected, depths: see `Question`.
    """

    task: str
    length: int
    index: int
    prompt: np.ndarray
    answer: np.ndarray
    expected: tuple[str, ...]
    depths: tuple[float, ...]


def make_sample(
    task: str, tokenizer: Tokenizer, *, length: int, index: int, seed: int, start: Sequence[int] = ()
) -> Sample:
    """Return sample `index` of a task, the same at every call and every rank.

    Needles lie where they do whatever the number of samples: see `evenly_spread`.

    Args:
        length: tokens of prompt and answer.
        start: tokens before every document, such as a BOS.

    Raises:
        ValueError: the length is too short for the task, or the tokenizer cannot write the answer.
    """
    rng = random.Random(f"{seed}/{task}/{length}/{index}")
    question = TASKS[task](rng, evenly_spread(index))
    answer = _answer(question, tokenizer)
    if not all(found_parts(question.expected, tokenizer.decode(answer))):
        raise ValueError(
            f"the tokenizer gives {question.answer!r} back as {tokenizer.decode(answer)!r}: task {task} needs one that "
            "keeps letters and digits, with a decoder in its file"
        )
    room = length - len(start) - len(answer)
    body = _longest(question, tokenizer, room)
    if body is None:
        needed = len(_encode(tokenizer, question.text(question.least))) + length - room
        raise ValueError(
            f"{length} tokens are too few for task {task}: it needs about {needed} with this tokenizer; "
            "evaluate at a greater length or with another suite"
        )
    lead_in = _last_tokens(Filler(rng), tokenizer, room - len(body))
    prompt = np.concatenate([np.asarray(start, dtype=np.int64), lead_in, body])
    return Sample(task, length, index, prompt, answer, question.expected, question.depths)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode_batch([text])[0], dtype=np.int64)


def _answer(question: Question, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of the answer as they follow the question; where they are not separable from it, those of it alone."""
    last_line = question.text(question.least).rpartition("\n")[2]
    before, whole = _encode(tokenizer, last_line), _encode(tokenizer, last_line + question.answer)
    if np.array_equal(whole[: len(before)], before):
        return whole[len(before) :]
    return _encode(tokenizer, question.answer)


def _longest(question: Question, tokenizer: Tokenizer, room: int) -> np.ndarray | None:
    """Tokens of about as many units as fit into `room`; None if not even the fewest do."""
    units, tokens = question.least, _encode(tokenizer, question.text(question.least))
    if len(tokens) > room:
        return None
    per_unit = (len(_encode(tokenizer, question.text(units + 64))) - len(tokens)) / 64
    too_many: int | None = None
    while (more := int((room - len(tokens)) / per_unit)) > 0:
        if too_many is not None:
            more = min(more, (too_many - units) // 2)
            if more == 0:
                break
        longer = _encode(tokenizer, question.text(units + more))
        if len(longer) <= room:
            units, tokens = units + more, longer
        else:
            too_many = units + more
    return tokens


def _last_tokens(filler: Filler, tokenizer: Tokenizer, count: int) -> np.ndarray:
    """The last `count` tokens of a text of sentences."""
    sentences = 4
    while len(tokens := _encode(tokenizer, " ".join(filler.first(sentences)))) < count:
        sentences *= 2
    return tokens[len(tokens) - count :]
