"""Ranks of a group agree on a call before any tensor moves: a mistake at one rank is an error at all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch.distributed as dist

from dash_dist.context_parallel.errors import naming_the_exchange

Checked = TypeVar("Checked")

_agreed: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Hashable, ...], None]] = weakref.WeakKeyDictionary()


MAX_REMEMBERED = 1024
"""Calls that a group has agreed on: packed documents make a new one of every step. All ranks forget the same ones."""


def check_together(
    check: Callable[[], tuple[Checked, Hashable]], call: tuple[Hashable, ...], group: dist.ProcessGroup, *, once: bool
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
        refused = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(answers) if message is not None]
        if refused:
            raise ValueError(f"context-parallel attention refused at {'; '.join(refused)}") from error
        if any(other != call for other, _ in answers):
            given = "; ".join(f"rank {rank}: {other}" for rank, (other, _) in enumerate(answers))
            raise ValueError(f"the ranks of a context-parallel group must call with equal shapes and settings: {given}")
        seen[call] = None
        if len(seen) > MAX_REMEMBERED:
            del seen[next(iter(seen))]
    assert result is not None  # an error was raised above
    return result
