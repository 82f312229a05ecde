"""Comparison of a call over the ranks of a group before any tensor moves: one rank's mistake is an error at all.

Knows names and values to compare; does not know their meaning.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors

Checked = TypeVar("Checked")
Named = tuple[str, Hashable]  # name of something that ranks must agree on, and its value at one of them

_agreed: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Named, ...], None]] = weakref.WeakKeyDictionary()


MAX_REMEMBERED = 1024
"""Calls kept per group; packed documents make a new one every step. All ranks drop the same ones."""


def check_together(
    check: Callable[[], tuple[Checked, tuple[Named, ...]]],
    call: tuple[Named, ...],
    group: dist.ProcessGroup,
    *,
    once: bool,
) -> Checked:
    """Runs check() on every rank, and compares `call` and the names and values that check() adds to it.

    Returns the first result of check(). Raises ValueError at every rank when check() raised one anywhere or when the
    calls differ. `once` skips the comparison for calls already agreed on, since on a GPU it costs a synchronisation
    with the host. A new call must then be new at all ranks: one that compares alone waits for the group's timeout.
    """
    error, result = None, None
    try:
        result, details = check()
        call = (*call, *details)
    except ValueError as caught:
        error = caught
    seen = _agreed.setdefault(group, {})
    if not (once and error is None and call in seen):
        answers: list[Any] = [None] * dist.get_world_size(group)
        with exchange_errors(group, "the comparison of the ranks' calls"):
            dist.all_gather_object(answers, (call, None if error is None else str(error)), group=group)
        refusals = [(rank, message) for rank, (_, message) in enumerate(answers) if message is not None]
        if refusals:
            raise ValueError(f"context-parallel attention refused at {_by_ranks(refusals)}") from error
        if any(other != call for other, _ in answers):
            given = "; ".join(
                f"{at_ranks[0][0]} is, at {_by_ranks([(rank, value) for rank, (_, value) in enumerate(at_ranks)])}"
                for at_ranks in zip(*(other for other, _ in answers), strict=True)
                if len(set(at_ranks)) > 1
            )
            raise ValueError(f"the ranks of a context-parallel group must call with equal shapes and settings: {given}")
        seen[call] = None
        if len(seen) > MAX_REMEMBERED:
            del seen[next(iter(seen))]
    assert result is not None  # an error was raised above
    return result


def _by_ranks(values: Sequence[tuple[int, Hashable]]) -> str:
    """Lists each value once, after the ranks that gave it."""
    ranks_of: dict[Hashable, list[int]] = {}
    for rank, value in values:
        ranks_of.setdefault(value, []).append(rank)
    return "; ".join(f"{_named(ranks)}: {value}" for value, ranks in ranks_of.items())


def _named(ranks: list[int]) -> str:
    """Formats rank numbers: rank 3, or ranks 0-2, 5."""
    runs = [[rank for _, rank in run] for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {spans}"
