"""What a rank says when the others do not answer: which group, which rank, and what was under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class ExchangeError(RuntimeError):
    """A collective of a context-parallel group failed: a rank died, or did not come within the group's timeout."""


@contextmanager
def naming_the_exchange(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Turns the error of a collective on `group` into an `ExchangeError` that names the ranks and `what` was under way.

    Put nothing but the collective, or the wait for it, inside: every RuntimeError counts as a failed one, except that
    of a device without memory. With NCCL a rank that waits on the GPU alone does not get here: PyTorch's watchdog ends
    the process after the group's timeout, and names the collective.
    """
    try:
        yield
    except (ExchangeError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {dist.get_rank()}: {what} did not get through in the context-parallel group of ranks "
            f"{dist.get_process_group_ranks(group)}: a rank of the group has died or did not answer within the group's "
            f"timeout; its own log says why ({error})"
        ) from error
