"""Command-line values that the benchmarks share."""

from __future__ import annotations

import argparse

from tools.benchmarks.common.inputs import DTYPES


def heads(text: str) -> tuple[int, int]:
    """QUERY,KV heads."""
    try:
        query, kv = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give QUERY,KV heads, such as 32,2") from None
    if kv < 1 or query < 1 or query % kv:
        raise argparse.ArgumentTypeError(f"{text!r}: the query heads must be a positive multiple of the KV heads")
    return query, kv


def density(text: str) -> float:
    """Selected / available chunks."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number in (0, 1]")
    return value


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all cases of a run share."""
    parser.add_argument("--chunk-size", type=int, default=64, help="tokens")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
