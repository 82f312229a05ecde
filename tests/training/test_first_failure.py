"""A rank that fails alone says so at once, and the others end within seconds with its reason."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dash_dist.planning.hardware import GPUS, Machine
from dash_dist.run.events import EventLog
from dash_dist.training.faults.memory import MemoryPlan
from tests.planning.planning_cases import large_config
from tests.support.runs import rank_processes, write_config

RANK = str(Path(__file__).with_name("failing_rank.py"))
OPTIONS = ["checkpoint.interval=3", "checkpoint.asynchronous=false", "training.distributed_timeout_seconds=300"]
GIB = 2**30


def outputs_of(folder, rank, phase, kind):
    """Start two ranks; return their exit statuses and outputs, and the seconds from the first end to the last."""
    config = str(write_config(folder))
    with rank_processes([RANK, str(rank), phase, kind, config, *OPTIONS], 2) as processes:

        def end_of(number):
            output, _ = processes[number].communicate(timeout=240)
            ended = time.monotonic()
            if kind == "stuck" and number != rank:
                processes[rank].kill()
            return output, ended

        with ThreadPoolExecutor() as pool:
            (first, second) = pool.map(end_of, range(2))
        statuses = [process.returncode for process in processes]
    return statuses, [first[0], second[0]], abs(first[1] - second[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "rank"), [("forward", 0), ("forward", 1), ("backward", 1), ("optimizer", 0), ("save", 0), ("save", 1)]
)
def test_a_rank_without_memory_ends_the_run_for_good(tmp_path, phase, rank):
    statuses, texts, seconds = outputs_of(tmp_path, rank, phase, "memory")
    assert 0 not in statuses
    assert seconds < 100  # a third of the ranks' time limit
    told = f"rank {rank} is out of memory in step {4 if phase == 'save' else 3}: CUDA out of memory. Tried to allocate"
    assert texts[rank].count(f"error: {told}") == 1
    # Within a save the ranks agree first, and the others hear of the error before it is put in words.
    assert (f"rank {rank}: OutOfMemoryError: CUDA" if phase == "save" else told) in texts[1 - rank]
    failed = [event for event in EventLog(tmp_path / "runs" / "tiny").read() if event.kind == "failed"]
    assert failed
    assert "out of memory" in failed[0].message


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), [("backward", 0), ("forward", 1)])
def test_a_defect_at_one_rank_is_printed_with_its_traceback(tmp_path, phase, rank):
    statuses, texts, seconds = outputs_of(tmp_path, rank, phase, "defect")
    assert 0 not in statuses
    assert seconds < 100  # a third of the ranks' time limit
    assert f"rank {rank} failed:" in texts[rank]
    assert "KeyError: 'a defect'" in texts[rank]
    assert f"rank {rank}: KeyError: 'a defect'" in texts[1 - rank]
    assert not [event for event in EventLog(tmp_path / "runs" / "tiny").read() if event.kind == "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_wait_for_a_failed_one_are_ended(tmp_path, rank):
    begun = time.monotonic()
    statuses, texts, _ = outputs_of(tmp_path, rank, "forward", "stuck")
    assert statuses[1 - rank] == 1
    assert time.monotonic() - begun < 200  # the ranks' own time limit is 300
    assert f"error: rank {1 - rank} is ended, because another one failed: rank {rank}: KeyError" in texts[1 - rank]


def test_a_plan_near_the_memory_of_a_device_is_a_warning():
    config = large_config()
    ranks = config.model_ranks

    def plan(gib):
        return MemoryPlan(config, Machine(GPUS["H100"], ranks, 8, gib * GIB), vocab_size=128_000)

    assert plan(20_000).warning() is None
    warning = plan(8).warning()
    assert warning.startswith("memory is tight: the plan predicts ")
    assert "a device has 8.0 GiB; " in warning
    told = plan(8).beside(kept=2 * GIB, peak=5 * GIB)
    assert "GiB planned, 2.0 GiB measured; activations and work space:" in told
    assert "GiB planned, 3.0 GiB measured; the plan's total is" in told


def test_a_plan_that_needs_more_host_memory_than_there_is_warns() -> None:
    config = large_config(
        training={"steps": 2, "sequence_length": 2**20, "global_batch_size": 1},
        parallel={"recompute": "full", "offload_activations": 1.0, "context": 8},
    )
    warning = MemoryPlan(config, Machine(GPUS["H100"], 8, 8, 2000 * GIB), vocab_size=128_000).warning()
    assert warning is not None
    assert re.match(
        r"host memory is short: the plan predicts 2\d\d\.\d GiB for the 8 ranks of a node, and .* available; lower "
        r"parallel\.offload_activations",
        warning,
    )
