"""Every kernel compiles for a GPU, also where the tests run without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import exhaustive

pytestmark = pytest.mark.slow

SHARED_MEMORY_OF_HOPPER = 232_448  # bytes per program
OF_A_WHOLE_PART = {
    "summary_kernel": 1,
    "route_kernel": 1,
    "attend_kernel": 1,
    "row_dots_kernel": 1,
    "query_gradient_kernel": 1,
    "query_bits_kernel": 1,
    "key_gradient_kernel": 1,
}
# With specialised warps.
PAIRS = {"attend_kernel": "attend_pairs_kernel", "query_gradient_kernel": "query_gradient_pairs_kernel"}
SPECIALISED = PAIRS | {"key_gradient_kernel": "key_gradient_gathered_kernel"}
# With and without a mean of log P; the first, a middle and the last of several parts, of which the last is blocks.
OF_EVERY_CALL = OF_A_WHOLE_PART | {
    "route_kernel": 2,
    "reached_kernel": 1,
    "attend_kernel": 4,
    "row_dots_kernel": 2,
    "query_gradient_kernel": 4,
    "query_bits_kernel": 2,
    "key_gradient_kernel": 2,
    "turn_kernel": 3,
    "cast_rows_kernel": 3,
}
# Lists are made by PyTorch.
OF_LISTS = {name: count for name, count in OF_EVERY_CALL.items() if name != "route_kernel"}


def compile_kernels(shape: str, cache: Path) -> list[dict[str, Any]]:
    """A row per kernel and variant; see `compile_kernels.Compiled`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), shape],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return [json.loads(line) for line in result.stdout.splitlines()]


VARIANTS = {
    "model": {SPECIALISED.get(name, name): count for name, count in OF_EVERY_CALL.items()},
    "group of 16": {SPECIALISED.get(name, name): count for name, count in OF_A_WHOLE_PART.items()},
    "float16": OF_A_WHOLE_PART,
    "padded": OF_EVERY_CALL,
    "largest": OF_A_WHOLE_PART,
    "largest float32": OF_A_WHOLE_PART,
    "narrow": {PAIRS.get(name, name): count for name, count in OF_A_WHOLE_PART.items()},
    "listed": OF_LISTS,
}


@pytest.mark.parametrize("shape", exhaustive(VARIANTS, {"group of 16", "padded", "largest float32"}))
def test_every_kernel_compiles_and_fits(shape: str, tmp_path: Path) -> None:
    kernels = compile_kernels(shape, tmp_path)
    names = [kernel["kernel"] for kernel in kernels]
    assert {name: names.count(name) for name in names} == VARIANTS[shape]
    too_large = {kernel["kernel"]: kernel["shared"] for kernel in kernels if kernel["shared"] > SHARED_MEMORY_OF_HOPPER}
    assert not too_large
    if shape in ("model", "group of 16", "float16", "narrow", "listed"):  # the kernels were tuned for it
        assert not [kernel["kernel"] for kernel in kernels if kernel["serialised"]]
    if shape == "float16":  # kernels on pairs of tiles have no other way to K and V
        assert any("MAPS=True" in kernel["variant"] for kernel in kernels)
