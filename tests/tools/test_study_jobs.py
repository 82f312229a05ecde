"""Cells of the study side by side: GPUs, failures, stops, shared texts; and one run of it at a tiny size."""

import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import run_command
from tests.tools import study_work
from tools.study.cells import _most_jobs
from tools.study.corpora import locked
from tools.study.deadline import Deadline, OutOfTime
from tools.study.jobs import Outcome, run_jobs, visible_gpus
from tools.study.parts import Cell
from tools.study.plot import plot_parts
from tools.study.results import Results
from tools.study.sizes import SIZES

SIZE = SIZES["cpu"]


def cells(*methods: str) -> list[Cell]:
    return [Cell("recall", "recall", method, 0) for method in methods]


def outcomes(
    asked: Sequence[Cell],
    work: Any,
    logs: Path,
    ended: Callable[[Outcome], None] = lambda outcome: None,
    *,
    gpus: Sequence[str] = ("",),
    per_gpu: int = 1,
    seconds: float | None = None,
) -> dict[str, Outcome]:
    """Return the outcomes by method, in the order of the ends; each is also given to `ended`."""
    found: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        found.append(outcome)
        ended(outcome)

    run_jobs(asked, work, note, gpus=gpus, per_gpu=per_gpu, logs=logs, deadline=Deadline(seconds))
    return {one.cell.method: one for one in found}


def test_jobs_run_side_by_side_on_every_gpu(tmp_path: Path) -> None:
    (meeting := tmp_path / "meeting").mkdir()
    work = functools.partial(study_work.meet, folder=meeting, together=4)
    found = outcomes(cells("a", "b", "c", "d"), work, tmp_path / "logs", gpus=["3", "GPU-5"], per_gpu=2)
    records = [one.record for one in found.values() if one.record]
    assert Counter(record["gpu"] for record in records) == {"3": 2, "GPU-5": 2}
    assert all(record["curve"] == {"1": 0.1 + 0.2} for record in records)
    for method, outcome in found.items():
        assert outcome.log == tmp_path / "logs" / f"recall.{method}.seed0.log"
        assert outcome.log.read_text() == f"recall {method} seed 0 met the others\n"
        assert outcome.seconds > 0


def test_cells_of_one_run_never_overlap(tmp_path: Path) -> None:
    asked = [Cell(part, "missing", "dash-1", 0) for part in ("missing", "budgets", "ablations-missing")]
    found: list[Outcome] = []
    work = functools.partial(study_work.alone, folder=tmp_path)
    run_jobs(asked, work, found.append, gpus=[""], per_gpu=3, logs=tmp_path / "logs", deadline=Deadline(None))
    assert [(one.cell, one.record) for one in found] == [(cell, {}) for cell in asked]


def test_a_failure_is_that_of_its_cell_alone(tmp_path: Path) -> None:
    asked = cells("refused", "wrong", "killed", "left", "fine")
    found = outcomes(asked, study_work.fail, tmp_path, per_gpu=2)
    errors = {method: outcome.error for method, outcome in found.items()}
    assert errors == {
        "refused": "no such setting: give another",
        "wrong": "KeyError: 'loss'",
        "killed": "ended by SIGKILL",
        "left": "ended with status 3",
        "fine": None,
    }
    assert {method: one.record for method, one in found.items() if one.record} == {"fine": {"method": "fine"}}
    assert 'raise KeyError("loss")' in found["wrong"].log.read_text()


def test_a_stopped_study_lets_its_trainings_save(tmp_path: Path) -> None:
    (work := tmp_path / "work").mkdir()
    asked = cells("first", "second", "third")
    found = outcomes(asked, functools.partial(study_work.train, folder=work), tmp_path, per_gpu=2)
    assert {path.name for path in work.iterdir()} == {"first", "first saved", "second", "second saved"}
    assert [(one.record, one.error) for one in found.values()] == [(None, None)] * 2


def test_the_limit_ends_what_does_not_end_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.study.deadline._TO_SAVE", 1.0)
    (work := tmp_path / "work").mkdir()
    found = outcomes(cells("a", "b"), functools.partial(study_work.hang, folder=work), tmp_path, seconds=2.0)
    assert [(method, one.record, one.error) for method, one in found.items()] == [("a", None, None)]
    assert found["a"].seconds < 60
    assert len(list(work.iterdir())) == 2
    wait_for_the_end_of([int(path.name) for path in work.iterdir()])
    assert outcomes(cells("a"), study_work.fail, tmp_path, seconds=1.0) == {}


def test_an_error_of_the_study_ends_its_jobs(tmp_path: Path) -> None:
    (work := tmp_path / "work").mkdir()

    def refuse(outcome: Outcome) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        outcomes(cells("ends", "hangs"), functools.partial(study_work.end, folder=work), tmp_path, refuse, per_gpu=2)
    assert len(list(work.iterdir())) == 2
    wait_for_the_end_of([int(path.name) for path in work.iterdir()])


def wait_for_the_end_of(pids: Sequence[int]) -> None:
    """Wait until the processes, which were killed, have ended."""
    until = time.monotonic() + 30.0  # half of what they would take to end by themselves
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_jobs_see_the_gpus_that_the_study_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7,-1,5")
    assert visible_gpus() == ["4", "GPU-7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus() == [""]


def test_one_process_at_a_time_has_the_texts_of_a_corpus(tmp_path: Path) -> None:
    inside: list[str] = []

    def enter(corpus: str) -> None:
        with locked(tmp_path, corpus, waiting=lambda: None):
            inside.append(corpus)
            time.sleep(0.1)
            assert inside == [corpus]
            inside.remove(corpus)

    threads = [threading.Thread(target=enter, args=(corpus,)) for corpus in ("code-8k", "code-32k")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []
    with locked(tmp_path, "code-8k", waiting=Deadline(None).check):
        with locked(tmp_path, "recall", waiting=Deadline(0.0).check):
            pass
        with pytest.raises(OutOfTime), locked(tmp_path, "code-32k", waiting=Deadline(0.0).check):
            pass


def test_a_run_keeps_the_most_jobs_that_it_was_trained_beside(tmp_path: Path) -> None:
    assert [_most_jobs(tmp_path / "run", jobs) for jobs in (1, 6, 2)] == [1, 6, 6]


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_measures_each_model_once(tmp_path: Path) -> None:
    done = run_command(
        [sys.executable, "-m", "tests.tools.study_job", str(tmp_path)], {"OMP_NUM_THREADS": "1"}, seconds=400
    )
    assert done.returncode == 0, done.stdout
    shown = [line for line in done.stdout.splitlines() if "results are there" in line or line == "stopped"]
    assert shown == ["stopped", *(f"{count} of 2 results are there" for count in (0, 2, 2))]
    assert done.stdout.count("-- ") == 2
    logs = tmp_path / "work" / "logs"
    log = (logs / "missing.dash-1.seed0.log").read_text()
    assert log.count("missing dash-1 seed 0: 768 tokens accuracy") == 1
    assert "step 1/" not in log  # the stopped training goes on
    assert "step 3/4" in log
    assert "step 1/" in (logs / "missing.nsa-6.seed0.log").read_text()
    records = list(Results(tmp_path / "out"))
    assert [(found["method"], found["jobs"]) for found in records] == [("dash-1", 2), ("nsa-6", 2)]
    assert len({found["texts"] for found in records}) == 1
    for found in records:
        assert list(found["training"]["loss"]) == [str(step) for step in range(1, SIZE.task_steps + 1)]
        assert [score["length"] for score in found["scores"]][: len(SIZE.lengths)] == list(SIZE.lengths)
        for score in found["scores"]:
            assert sum(score["asked"].values()) > 20
            assert len(score["layers"]) == (0 if score["attention"] else 2)
    assert 0 < records[1]["scores"][0]["density"] < 1
    assert plot_parts(tmp_path / "out", records)[0].read_bytes().startswith(b"\x89PNG")
