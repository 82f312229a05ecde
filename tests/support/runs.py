"""Runs of a model with steps of milliseconds, in child processes, and their curves.

Knows configurations, processes and TensorBoard files; does not know the training code.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.processes import PythonProcess
from tests.support.ranks import free_port

TINY = {
    "run": {"name": "tiny"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
    },
    "attention": {"chunk_size": 32, "routing_scale": 8.0, "exchange": "selective"},
    "parallel": {"context": 2},
    "optimizer": {"lr": 1.0e-2, "warmup_steps": 2},
    "training": {
        "steps": 20,
        "sequence_length": 256,
        "global_batch_size": 2,
        "distributed_timeout_seconds": 60,
    },
    "checkpoint": {"interval": 10},
    "logging": {"interval": 1, "routing_interval": 5, "heat_map_layers": []},  # a map takes as long as two steps
}


def write_config(folder: Path) -> Path:
    """Write the tiny configuration to `folder`; its runs are in `folder / "runs"`."""
    config = {**TINY, "run": {"name": "tiny", "directory": str(folder / "runs")}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def cpu_environment(changes: dict[str, str]) -> dict[str, str]:
    """Return the environment of child processes, without GPUs, since runs are compared closely."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", **changes}


@contextlib.contextmanager
def rank_processes(arguments: Sequence[str], world_size: int) -> Iterator[list[PythonProcess]]:
    """Run `python ARGUMENTS` as every rank of a world, and kill all ranks on exit from the context."""
    port = free_port()
    processes = [
        PythonProcess(
            arguments,
            cpu_environment(
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                }
            ),
        )
        for rank in range(world_size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_rank_processes(arguments: Sequence[str], world_size: int, *, seconds: float = 120) -> list[tuple[int, str]]:
    """Return (exit status, output) of every rank of `python ARGUMENTS`."""
    with rank_processes(arguments, world_size) as processes:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def run_command(
    command: Sequence[str], environment: dict[str, str], *, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a launcher, and end it with all its children after `seconds`."""
    process = subprocess.Popen(
        command,
        env=cpu_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, output)


def read_curves(run_folder: Path) -> EventAccumulator:
    """Return the curves of a run, without steps that a resume purged."""
    curves = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    curves.Reload()
    return curves


def losses(run_folder: Path) -> dict[int, float]:
    """Return step -> train/loss."""
    return {event.step: event.value for event in read_curves(run_folder).Scalars("train/loss")}
