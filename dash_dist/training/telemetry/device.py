"""Figures of the device a rank runs on: the memory it used, and the published peak of its arithmetic."""

import resource
import sys

import torch

# Dense bf16 peak in FLOP/s as published by NVIDIA for the SXM form (L40S: PCIe), by a part of the device's name; the
# first match counts.
_PEAK_BF16_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}

_GIB = 1 << 30


def memory_used(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: on GPU the peaks since the last call, on CPU the largest resident set so far."""
    if device.type == "cuda":
        used = {
            "allocated_peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
            "reserved_peak_gib": torch.cuda.max_memory_reserved(device) / _GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return used
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return {"rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}


def peak_bf16_flops(device: torch.device) -> float | None:
    """Published dense bf16 peak of the device in FLOP/s; None for a CPU and for a GPU that is not listed here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _PEAK_BF16_FLOPS.items() if part in name), None)
