"""The doctor's own processes: what hangs, dies or fails is a failure with advice, and nothing stays behind."""

import os
import time
from pathlib import Path

import psutil
import pytest

from dash_dist.doctor import Finding, Site, Status
from dash_dist.doctor.checks import parity
from dash_dist.doctor.findings import Check, Where
from dash_dist.doctor.runner import run_check
from tests.doctor import doctor_jobs

pytestmark = pytest.mark.slow


def outcome(function, where: Where, directory: Path, *, time_limit: float = 90.0) -> Finding:
    """The first finding that is no success, or the last one."""
    site = Site(ranks=2, gpus=0, directory=directory)
    findings = run_check(Check("the check", function, where, "what to do", time_limit), site)
    return next((finding for finding in findings if finding.status is not Status.OK), findings[-1])


def gone(pid: int) -> bool:
    """Whether a process has ended, or ends within seconds."""
    try:
        psutil.Process(pid).wait(timeout=20)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def started_here() -> set[int]:
    """Processes below this one that run a check; the server that they are forked from stays, and its tracker."""
    processes = psutil.Process().children(recursive=True)
    return {one.pid for one in processes if one.ppid() != os.getpid()}


def test_a_rank_that_hangs_is_ended_and_reported(tmp_path):
    started = time.monotonic()
    finding = outcome(doctor_jobs.hangs, Where.RANKS, tmp_path, time_limit=20.0)
    assert (finding.status, finding.name, finding.advice) == (Status.FAILURE, "the check", "what to do")
    # Rank 0 may notice first, by the group's time limit.
    assert "no answer within 20 s" in finding.text or "Timed out" in finding.text
    assert time.monotonic() - started < 80
    assert gone(int((tmp_path / "pid").read_text()))
    assert not started_here()


def test_what_a_check_started_is_ended_with_it(tmp_path):
    finding = outcome(doctor_jobs.leaves_a_process, Where.CHILD, tmp_path, time_limit=10.0)
    assert finding.text == "no answer within 10 s"
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_rank_that_dies_is_reported_with_its_last_words(tmp_path):
    finding = outcome(doctor_jobs.dies, Where.RANKS, tmp_path)
    assert finding.status is Status.FAILURE
    assert finding.text == "the process died with status 7\n  | the last words of rank 1"


@pytest.mark.parametrize("where", [Where.HERE, Where.CHILD])
def test_a_check_that_raises_is_a_failure_and_no_traceback(tmp_path, where):
    finding = outcome(doctor_jobs.raises, where, tmp_path)
    assert finding.status is Status.FAILURE
    assert finding.text.startswith("RuntimeError: a library that is broken (doctor_jobs.py line")
    assert "Traceback" not in finding.text
    assert finding.advice == "what to do"


def test_checks_between_gpus_are_skipped_without_them(tmp_path):
    check = Check("between GPUs", parity.canary, Where.GPU_RANKS, "what to do")
    for gpus, why in ((0, "no CUDA device"), (1, "one GPU: NCCL needs two")):
        (finding,) = run_check(check, Site(ranks=2, gpus=gpus, directory=tmp_path))
        assert (finding.status, finding.text) == (Status.SKIPPED, why)


def test_a_clock_that_is_behind(tmp_path):
    finding = outcome(doctor_jobs.clock_behind, Where.RANKS, tmp_path)
    assert finding.status is Status.FAILURE
    assert finding.value == pytest.approx(5.0, abs=1.0)
    assert "chrony" in finding.advice


def test_a_rank_that_does_not_see_the_directory(tmp_path):
    finding = outcome(doctor_jobs.blind_rank, Where.RANKS, tmp_path)
    assert finding.status is Status.FAILURE
    assert "ranks [1] of 2 do not see" in finding.text
    assert "storage that" in finding.advice
    assert not list(tmp_path.iterdir())


def test_a_sum_that_is_wrong_at_one_rank(tmp_path):
    finding = outcome(doctor_jobs.wrong_sum, Where.RANKS, tmp_path)
    assert (finding.status, finding.name) == (Status.FAILURE, "all-reduce (gloo)")
    assert "wrong at ranks [1] of 2" in finding.text
    assert "NCCL_P2P_DISABLE" in finding.advice


def test_a_full_disk(tmp_path):
    finding = outcome(doctor_jobs.no_room, Where.CHILD, tmp_path)
    assert finding.status is Status.FAILURE
    assert "while 256 MiB were written" in finding.text
    assert "Free space" in finding.advice
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("job", "exchange", "what"),
    [
        (doctor_jobs.canary_with_a_wrong_value, "ring", "output"),
        (doctor_jobs.canary_with_a_wrong_value, "allgather", "output"),
        (doctor_jobs.canary_with_a_wrong_value, "selective", "output"),
        (doctor_jobs.canary_with_a_lost_gradient, "selective", "gradient of k"),
        (doctor_jobs.canary_with_a_lost_gradient, "ring", "gradient of v"),
    ],
)
def test_the_canary_dies_of_one_broken_exchange_and_names_it(tmp_path, job, exchange, what):
    finding = outcome(job, Where.RANKS, tmp_path / exchange)
    assert (finding.status, finding.name) == (Status.FAILURE, "CP on = CP off (gloo)")
    assert f"{exchange}, one document: {what} by" in finding.text
    assert not [other for other in ("ring", "allgather", "selective") if other != exchange and other in finding.text]
    assert "parallel.context=1" in finding.advice
