"""Every kernel compiles for a GPU, also where the tests run without one."""

import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY_OF_HOPPER = 232_448  # bytes per program


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    shared = dict(line.split() for line in result.stdout.splitlines())
    assert len(shared) == 8
    assert all(int(size) <= SHARED_MEMORY_OF_HOPPER for size in shared.values()), shared
