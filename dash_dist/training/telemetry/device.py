"""Memory used on a rank's device, and the published peak of its arithmetic.

Knows devices; does not know steps.
"""

import resource
import sys

import torch

# Part of the device's name -> dense bf16 peak in FLOP/s, as published by NVIDIA for the SXM form (L40S: PCIe). The
# first match counts.
_PEAK_BF16_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}

_GIB = 1 << 30


def memory_used(device: torch.device) -> dict[str, float]:
    """Return name -> GiB of this process: on a GPU the peaks since the last call, on a CPU the largest resident set."""
    if device.type == "cuda":
        used = {
            "allocated_peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
            "reserved_peak_gib": torch.cuda.max_memory_reserved(device) / _GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return used
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return {"rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}


def wait_for_device(device: torch.device) -> None:
    """Return once the device has done what it was given. A CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bf16_flops(device: torch.device) -> float | None:
    """Return the published dense bf16 peak of the device in FLOP/s; None for CPUs and unlisted GPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _PEAK_BF16_FLOPS.items() if part in name), None)
