"""What the rank of the conversion benchmark's test does. The test process does not import this."""

from pathlib import Path
from typing import Any

import pytest
import typer

from tools.benchmarks.conversion.__main__ import main

SMALLEST: dict[str, Any] = {
    "layers": 1,
    "hidden": 64,
    "sequence_length": 384,
    "batch_size": 1,
    "chunk_size": 16,
    "dense_steps": 3,
    "steps": 3,
    "phase_steps": 3,
    "warmup_steps": 2,
    "warmup_start": 0.01,
    "routing_scale": 500.0,
    "prior_sigma": 4.0,
    "unchanged_scale": [0.01],
    "unchanged_chunks": [8],
    "question_length": [320],
    "samples": 1,
    "heldout": 2,
    "mebibytes": 0.1,
}


def measure(out: Path) -> None:
    main(out, **SMALLEST)


def refused(out: Path, change: dict[str, Any]) -> str:
    """The error of settings with a change."""
    with pytest.raises(typer.BadParameter) as raised:
        main(out, **SMALLEST | change)
    return str(raised.value)
