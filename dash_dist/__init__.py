"""Training of language models on very long sequences with context-parallel DashAttention.

Knows the public names; does not know their modules until one is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash_dist.context_parallel import DashAttention, dash_attention, join_sequence, shard_positions, split_sequence

__all__ = ["DashAttention", "dash_attention", "join_sequence", "shard_positions", "split_sequence"]


def __getattr__(name: str) -> Any:
    """Import the attention, and torch with it, on first use, so that the command line starts fast."""
    if name in __all__:
        return getattr(importlib.import_module("dash_dist.context_parallel"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
