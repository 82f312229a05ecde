"""A model that trains in milliseconds a step, its runs in child processes, and their curves read back."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    "logging": {"interval": 1, "routing_interval": 5},
}


def write_config(folder: Path) -> Path:
    """The tiny configuration as a file in `folder`, its runs in `folder / "runs"`."""
    config = {**TINY, "run": {"name": "tiny", "directory": str(folder / "runs")}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def cpu_environment(changes: dict[str, str]) -> dict[str, str]:
    """For child processes: runs are compared closely, and do not share GPUs with other tests."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", **changes}


@contextlib.contextmanager
def rank_processes(arguments: Sequence[str], world_size: int) -> Iterator[list[subprocess.Popen[str]]]:
    """`python ARGUMENTS` as every rank of a world; whatever happens, none outlives the context."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=cpu_environment(
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                }
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
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
    """(exit status, output) of every rank of `python ARGUMENTS`."""
    with rank_processes(arguments, world_size) as processes:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def run_command(
    command: Sequence[str], environment: dict[str, str], *, seconds: float = 150
) -> subprocess.CompletedProcess[str]:
    """A launcher and all it starts, ended together after `seconds`."""
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
    """The curves of a run, everything that a resume purged left out."""
    curves = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    curves.Reload()
    return curves


def losses(run_folder: Path) -> dict[int, float]:
    """step -> train/loss."""
    return {event.step: event.value for event in read_curves(run_folder).Scalars("train/loss")}
