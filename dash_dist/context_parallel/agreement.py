"""Ranks of a group agree on a call before any tensor moves: a mistake at one rank is an error at all of them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from dash_dist.context_parallel.errors import naming_the_exchange

Checked = TypeVar("Checked")
Named = tuple[str, Hashable]  # something that ranks must agree on, and its value at one of them

_agreed: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Named, ...], None]] = weakref.WeakKeyDictionary()


MAX_REMEMBERED = 1024
"""Calls that a group has agreed on: packed documents make a new one of every step. All ranks forget the same ones."""


def check_together(
    check: Callable[[], tuple[Checked, Named]], call: tuple[Named, ...], group: dist.ProcessGroup, *, once: bool
) -> Checked:
    """Runs check() on every rank, and compares `call` (shapes and settings) and what else check() says that ranks must
    agree on. Returns the other result of check().

    Raises ValueError at every rank when check() raised one anywhere or when the calls differ. `once` skips the exchange
    for calls already agreed on, since on a GPU it costs a synchronisation with the host. The ranks must then meet new
    calls together: if one does alone, the others go on without it, up to the group's timeout.
    """
    error, result = None, None
    try:
        result, detail = check()
        call = (*call, detail)
    except ValueError as caught:
        error = caught
    seen = _agreed.setdefault(group, {})
    if not (once and error is None and call in seen):
        answers: list[Any] = [None] * dist.get_world_size(group)
        with naming_the_exchange(group, "the comparison of the ranks' calls"):
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
    """Each value once, after the ranks that gave it."""
    ranks_of: dict[Hashable, list[int]] = {}
    for rank, value in values:
        ranks_of.setdefault(value, []).append(rank)
    return "; ".join(f"{_named(ranks)}: {value}" for value, ranks in ranks_of.items())


def _named(ranks: list[int]) -> str:
    """For people: rank 3, or ranks 0-2, 5."""
    runs = [[rank for _, rank in run] for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {spans}"
