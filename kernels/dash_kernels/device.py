"""The record of a device that kernel selection and launch tables read.

Knows torch's device properties; does not know kernels.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Device:
    """Properties of a device.

    architecture:    "sm_90" for CUDA, "gfx942" for ROCm, "interpreter" where Triton interprets kernels, else torch's
                     device type.
    multiprocessors: number of multiprocessors; 3 without a GPU, so that persistent programs get unequal shares.
    """

    architecture: str
    multiprocessors: int = 3

    @property
    def is_cuda(self) -> bool:
        """A CUDA GPU, which excludes ROCm."""
        return self.architecture.startswith("sm_")

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Device:
        """Describe a torch device. Triton reads TRITON_INTERPRET when it is imported, hence one answer per process."""
        if os.environ.get("TRITON_INTERPRET") == "1":
            return Device(INTERPRETER)
        if device.type != "cuda":
            return Device(device.type)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
        return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
