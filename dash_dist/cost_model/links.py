"""Rates of the links between GPUs: the one table for `exchange="auto"`, the planner and the benchmarks' predictions.

Knows published, measured and assumed rates, in bytes/s per GPU and direction; does not know what travels.
"""

from __future__ import annotations

from dataclasses import dataclass

# NVIDIA's data sheets of the SXM form (B200: HGX B200), half of the bidirectional rate.
NVLINK_PUBLISHED = {"H100": 450e9, "H200": 450e9, "A100": 300e9, "B200": 900e9}

# 320 of 450 GB/s: an all-to-all of two H200 with NCCL's default blocks reached 317 to 324 GB/s each way
# (docs/context-parallelism.md). The planner applies it to every kind of GPU.
NVLINK_SHARE = 0.71

# The rate of "auto" on any GPU, so that all ranks choose equally: the measured 317 to 324 GB/s, rounded down.
ALL_TO_ALL_RATE = 300e9

# One 400 Gb/s adapter for each GPU: its published rate, which the benchmarks' predictions take as reached.
ADAPTER_PUBLISHED = 50e9

# 80 % of the adapter's rate, assumed: "auto" and the planner.
NETWORK_RATE = 40e9

# Seconds from issuing a collective, or a step of the ring, to its first byte; assumed.
LATENCY = 20e-6

# Reads and writes of a copy in GPU memory, for "auto": about a third of an H200's published 4.8 TB/s, assumed. The
# planner takes a share of the published bandwidth of each kind instead (planning/assumptions.py).
COPY_RATE = 1.5e12


@dataclass(frozen=True)
class Links:
    """Rates of the links, per rank and direction. The defaults are those of `exchange="auto"`.

    latency:          seconds from issuing a collective, or a step of the ring, to its first byte
    fast_bandwidth:   bytes/s that a rank sends within its node in an all-to-all
    slow_bandwidth:   bytes/s that a rank sends to other nodes
    memory_bandwidth: bytes/s of reads and writes of a copy
    """

    latency: float = LATENCY
    fast_bandwidth: float = ALL_TO_ALL_RATE
    slow_bandwidth: float = NETWORK_RATE
    memory_bandwidth: float = COPY_RATE

    def seconds(self, fast: float, slow: float, *, messages: int = 0, merged: float = 0.0) -> float:
        """Return the time of one rank's bytes by link, of its messages and of the bytes that merging touches."""
        return (
            messages * self.latency
            + fast / self.fast_bandwidth
            + slow / self.slow_bandwidth
            + merged / self.memory_bandwidth
        )
