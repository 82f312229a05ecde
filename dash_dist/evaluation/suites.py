"""Tasks by name, and the suites that they make up.

Knows which tasks there are; does not know what they ask.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from dash_dist.evaluation.aggregation import common_words, frequent_words
from dash_dist.evaluation.question import Question
from dash_dist.evaluation.retrieval import multi_key, multi_query, multi_value, single
from dash_dist.evaluation.tracking import variable_tracking

Task = Callable[[random.Random, float], Question]
"""Function from random numbers and the depth of the first part that counts to a question."""

TASKS: dict[str, Task] = {
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
}

SUITES: dict[str, tuple[str, ...]] = {
    "retrieval": ("single", "multi_key", "multi_value", "multi_query"),
    "tracking": ("variable_tracking",),
    "aggregation": ("common_words", "frequent_words"),
    "all": tuple(TASKS),
    **{task: (task,) for task in TASKS},
}
"""Tasks by the name of a suite; a task's name is a suite of that task."""
