"""One training run by launch/ray_train.py on a cluster, as a child process.

Knows the run's configuration and how it is started; does not know what disturbs it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storm.cluster import LocalCluster

ROOT = Path(__file__).parents[2]
WORKERS = 4


@dataclass(frozen=True)
class RunFiles:
    """Where a run of the storm is: its `config` file, its own `directory`, what its driver prints (`log`)."""

    config: Path
    directory: Path
    log: Path


def write_run(folder: Path, name: str, *, steps: int, interval: int, hang_seconds: int) -> RunFiles:
    """The configuration of a run of CP=2 and DP=2 that is small, and whose checkpoints are larger than its curves.

    `interval` steps lie between its checkpoints; a rank that makes no step for `hang_seconds` counts as hung.
    """
    config: dict[str, Any] = {
        "run": {"name": name, "directory": str(folder / "runs")},
        "model": {
            "num_layers": 2,
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
        },
        "attention": {"chunk_size": 32, "routing_scale": 8.0, "exchange": "selective"},
        "parallel": {"context": 2},
        "optimizer": {"lr": 3.0e-3, "warmup_steps": 2},
        "training": {
            "steps": steps,
            "sequence_length": 128,
            "global_batch_size": 4,
            "distributed_timeout_seconds": 2 * hang_seconds,
        },
        "checkpoint": {"interval": interval, "keep": 3},
        "logging": {"interval": 5, "routing_interval": 50},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return RunFiles(path, folder / "runs" / name, folder / f"{name}.log")


def start_run(cluster: LocalCluster, files: RunFiles) -> subprocess.Popen[bytes]:
    """Its driver, a child of this process."""
    command = [sys.executable, str(ROOT / "launch" / "ray_train.py"), str(files.config)]
    command += ["--num-workers", str(WORKERS), "--max-failures", "1000"]
    with files.log.open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**cluster.environment, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish_run(driver: subprocess.Popen[bytes], files: RunFiles, *, seconds: float) -> None:
    """Wait for its end. Raises RuntimeError with its last words if it fails, TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while driver.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{files.config.stem} took more than {seconds:.0f} s; its driver's last words:\n{tail(files.log)}")
        time.sleep(0.2)
    if driver.returncode != 0:
        raise RuntimeError(f"{files.config.stem} ended with status {driver.returncode}:\n{tail(files.log)}")


def tail(path: Path, lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
