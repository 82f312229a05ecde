"""Sizes of batches and sequences that fit each other.

Knows numbers; does not know documents.
"""

from typing import Any

from dash_dist.config.data import DataConfig, check_separate
from dash_dist.config.run import RunConfig


def sizes_of(config: RunConfig, dp_rank: int, dp_size: int) -> dict[str, Any]:
    """Return the sizes of a run at one data-parallel rank, as `build_data_stream` and `check_sizes` take them."""
    return {
        "sequence_length": config.training.sequence_length,
        "global_batch_size": config.training.global_batch_size,
        "dp_rank": dp_rank,
        "dp_size": dp_size,
        "micro_batch_size": config.training.micro_batch_size,
        "chunk_size": config.attention.chunk_size,
    }


def check_sizes(
    config: DataConfig,
    *,
    sequence_length: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    chunk_size: int,
) -> None:
    """Refuse, with ValueError, sizes that do not fit each other or the data's options."""
    for name, size in (
        ("sequence_length", sequence_length),
        ("global_batch_size", global_batch_size),
        ("dp_size", dp_size),
        ("micro_batch_size", micro_batch_size),
    ):
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is not in [0, dp_size={dp_size})")
    unit = dp_size * micro_batch_size
    if global_batch_size % unit:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of dp_size x micro_batch_size = "
            f"{dp_size} x {micro_batch_size}: use {(global_batch_size // unit + 1) * unit}"
        )
    if config.documents == "separate":
        check_separate(sequence_length=sequence_length, micro_batch_size=micro_batch_size, chunk_size=chunk_size)
