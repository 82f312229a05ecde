"""Error of a failed exchange, which names the group, the rank and the collective.

Knows process groups; does not know what they exchange.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class ExchangeError(RuntimeError):
    """A collective of a context-parallel group failed: a rank died, or did not come within the group's timeout."""


@contextmanager
def exchange_errors(group: dist.ProcessGroup, name: str) -> Iterator[None]:
    """Turns the error of a collective on `group` into an `ExchangeError` with the ranks and the collective's `name`.

    Put only the collective, or the wait for it, inside: every RuntimeError except that of a device without memory
    counts as its failure. With NCCL a rank that waits on the GPU alone does not get here. PyTorch's watchdog then ends
    the process after the group's timeout, and names the collective.
    """
    try:
        yield
    except (ExchangeError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {dist.get_rank()}: {name} did not get through in the context-parallel group of ranks "
            f"{dist.get_process_group_ranks(group)}: a rank of the group has died or did not answer within the group's "
            f"timeout; its own log says why ({error})"
        ) from error
