"""What the rank of the conversion benchmark's test does. The test process does not import this."""

from pathlib import Path

from tools.benchmarks.conversion.__main__ import main


def measure(out: Path) -> None:
    main(
        out,
        layers=1,
        hidden=64,
        sequence_length=128,
        batch_size=1,
        chunk_size=16,
        dense_steps=3,
        steps=3,
        phase_steps=3,
        warmup_steps=2,
        warmup_start=0.01,
        routing_scale=500.0,
        mebibytes=0.1,
    )
