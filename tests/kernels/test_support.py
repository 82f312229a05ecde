"""The support table: its page in the docs, and the choice of specialised kernels."""

from pathlib import Path

import pytest
import torch

from dash_kernels.device import Device
from dash_kernels.support import markdown, obstacle, specialised

PAGE = Path(__file__).parents[2] / "docs" / "porting.md"
HOPPER, BLACKWELL, AMD, CPU = (Device(name) for name in ("sm_90", "sm_100", "gfx942", "cpu"))


def test_the_page_has_the_table() -> None:
    assert markdown() in PAGE.read_text()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "chunk_size", "group", "expected"),
    [
        (HOPPER, torch.bfloat16, 128, 64, 4, True),
        (HOPPER, torch.bfloat16, 128, 64, 1, False),
        (HOPPER, torch.bfloat16, 128, 64, 3, False),
        (HOPPER, torch.bfloat16, 128, 32, 4, False),
        (HOPPER, torch.bfloat16, 96, 64, 4, False),
        (HOPPER, torch.float16, 128, 64, 4, False),
        (BLACKWELL, torch.bfloat16, 128, 64, 4, False),
        (CPU, torch.bfloat16, 128, 64, 4, False),
    ],
)
def test_specialised_kernels(
    device: Device, dtype: torch.dtype, head_dim: int, chunk_size: int, group: int, expected: bool
) -> None:
    for stage in ("attend", "key_gradient"):
        assert specialised(stage, device, dtype, head_dim, chunk_size, group) == expected
    assert not specialised("route", device, dtype, head_dim, chunk_size, group)


def test_head_dim_64_has_specialised_kernels_for_queries_only() -> None:
    call = HOPPER, torch.bfloat16, 64, 64, 4
    assert specialised("attend", *call)
    assert specialised("query_gradient", *call)
    assert not specialised("key_gradient", *call)


def test_devices_without_kernels_are_named() -> None:
    assert obstacle(AMD, torch.bfloat16, 128, 64, 4) == "the kernels are made for CUDA GPUs"
    assert obstacle(CPU, torch.bfloat16, 128, 64, 4) == "the kernels are made for CUDA GPUs"
    assert obstacle(BLACKWELL, torch.bfloat16, 128, 64, 4) is None
    assert obstacle(BLACKWELL, torch.float32, 128, 64, 4) == "float32 fits into the shared memory of Hopper GPUs only"
