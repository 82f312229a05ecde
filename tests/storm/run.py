"""Training run by launch/ray_train.py on a cluster: its configuration, and its driver as a child process.

Knows how a run is configured and started; does not know faults.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.storm.cluster import LocalCluster
from tests.storm.errors import StormError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RunFiles:
    """Files of a run: its `config`, its `directory`, and the `log` of its driver."""

    config: Path
    directory: Path
    log: Path


@dataclass(frozen=True)
class Patience:
    """Timeouts of a run in seconds: short enough to notice faults, long enough for a slow machine.

    Attributes:
        answer: time without an answer to the driver, after which a rank counts as lost.
    """

    answer: int

    @classmethod
    def after_start_of(cls, seconds: float) -> Patience:
        """Return timeouts for a machine on which a run took `seconds` to its first step."""
        return cls(answer=max(10, math.ceil(1.5 * seconds)))

    @property
    def hang(self) -> int:
        """Seconds without progress before a rank's watchdog ends it; longer than `answer`, as in real runs."""
        return 2 * self.answer

    @property
    def end(self) -> int:
        """Seconds for all processes of a run to end that fails for good; a minute on a machine that is not busy."""
        return max(60, 2 * self.answer)


def write_run(folder: Path, name: str, *, steps: int, interval: int, patience: Patience) -> RunFiles:
    """Write the configuration of a small run with CP=2, whose checkpoints are larger than its curves."""
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
            "micro_batch_size": 2,
            "distributed_timeout_seconds": 4 * patience.answer,
        },
        "checkpoint": {"interval": interval, "keep": 3},
        "faults": {"hang_timeout_seconds": patience.hang},
        "logging": {"interval": 5, "routing_interval": 50},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return RunFiles(path, folder / "runs" / name, folder / f"{name}.log")


def start_run(
    cluster: LocalCluster, files: RunFiles, patience: Patience, *, workers: int, node_wait: float | None = None
) -> subprocess.Popen[bytes]:
    """Start the driver of a run as a child of this process; a driver that follows another one continues its log.

    Args:
        node_wait: seconds that the run waits for a replacement before it continues with fewer nodes. The default gives
            the cluster time to move a lost node's ranks to the spare node.
    """
    options = {
        "num-workers": workers,
        "max-failures": 10,  # in a row: a fault may strike while the run recovers from another
        "answer-timeout-seconds": patience.answer,
        "node-wait-seconds": 4 * patience.answer if node_wait is None else node_wait,
        "grow-interval-seconds": patience.answer,
    }
    command = [sys.executable, str(ROOT / "launch" / "ray_train.py"), str(files.config)]
    command += [f"--{name}={value}" for name, value in options.items()]
    with files.log.open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**cluster.environment, "RAY_ADDRESS": cluster.address},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish_run(driver: subprocess.Popen[bytes], files: RunFiles, *, seconds: float) -> None:
    """Wait for the driver. Raises StormError with the end of its log if it fails or exceeds `seconds`."""
    deadline = time.monotonic() + seconds
    while driver.poll() is None:
        if time.monotonic() > deadline:
            raise StormError(f"{files.config.stem} took more than {seconds:.0f} s:\n{tail(files.log)}")
        time.sleep(0.2)
    if driver.returncode != 0:
        raise StormError(f"{files.config.stem} ended with status {driver.returncode}:\n{tail(files.log)}")


def tail(path: Path, lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
