"""The checkpoints of a run, with an engine that writes one small file."""

import errno
import math
import os
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dash_dist.checkpoints import folders, integrity
from dash_dist.checkpoints.integrity import FileChecksum
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import CheckpointError
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager
from tests.support.ranks import run_ranks

TIMEOUT = timedelta(seconds=30)


@dataclass
class FileSave:
    """Writes when asked to finish; `disk_full` fails as a full disk does, with half of the file written."""

    path: Path
    value: str
    disk_full: bool
    ended: bool = True
    abandoned: bool = False

    def done(self) -> bool:
        return self.ended

    def finish(self) -> dict[str, FileChecksum]:
        self.path.write_text(self.value)
        if self.disk_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return {}

    def abandon(self) -> None:
        self.abandoned = True


@dataclass
class FileEngine:
    """`value` is all there is to save."""

    value: str = "weights"
    disk_full: bool = False
    last: FileSave | None = None

    def prepare_save(self) -> None: ...

    def start_save(self, directory: Path, *, background: bool) -> FileSave:
        directory.mkdir(exist_ok=True)
        self.last = FileSave(directory / f"rank_{dist.get_rank()}.json", self.value, self.disk_full)
        return self.last

    def load(self, directory: Path) -> list[str]:
        self.value = (directory / f"rank_{dist.get_rank()}.json").read_text()
        return [f"now {self.value}"]


@pytest.fixture
def control():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ControlGroup(TIMEOUT)
    dist.destroy_process_group()


@pytest.fixture
def manager(tmp_path, control):
    return CheckpointManager(tmp_path, control, keep=2)


def start(manager, step, engine=None):
    state = RunState(step=step)
    manager.start(state, engine or FileEngine(), {"place": step})


def save(manager, step, engine=None):
    start(manager, step, engine)
    return manager.finish().folder


def names(manager):
    return sorted(path.name for path in manager.directory.iterdir())


def test_a_checkpoint_gives_back_what_was_saved(manager):
    state = RunState(step=10, tokens=1000, first_loss=5.5, last_loss=math.nan, origin="/elsewhere/step_00000001")
    manager.start(state, FileEngine("w10"), {"a": 1, "b": 2})
    saved = manager.finish()
    assert (saved.step, saved.folder) == (10, manager.directory / "step_00000010")
    assert saved.blocked_seconds > 0
    engine = FileEngine("nothing")
    loaded, data_state, changes = manager.load(manager.resume_from("auto"), engine)
    assert repr(loaded) == repr(state)  # nan is not equal to itself
    assert (data_state, changes, engine.value) == ({"a": 1, "b": 2}, ["now w10"], "w10")


def test_nothing_is_visible_before_every_rank_has_written(manager):
    engine = FileEngine()
    start(manager, 10, engine)
    engine.last.ended = False
    assert (manager.pending, manager.writing()) == (True, True)
    assert names(manager) == [".step_00000010.partial"]
    engine.last.ended = True
    assert (manager.pending, manager.writing()) == (True, False)
    with pytest.raises(RuntimeError, match="step 10 is not finished"):
        start(manager, 20)
    assert manager.finish().step == 10
    assert (manager.pending, manager.writing()) == (False, False)
    assert names(manager) == ["step_00000010"]
    assert manager.finish() is None


def test_a_run_that_ends_abandons_what_it_is_writing(manager):
    engine = FileEngine()
    start(manager, 10, engine)
    manager.close()
    assert engine.last.abandoned
    assert not manager.pending


def test_only_the_latest_stay(manager):
    for step in (5, 10, 15):
        save(manager, step)
    assert names(manager) == ["step_00000010", "step_00000015"]


def test_older_ones_that_cannot_be_removed_do_not_undo_the_new_one(manager, monkeypatch):
    for step in (10, 20):
        save(manager, step)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "drop", lambda folder: (_ for _ in ()).throw(PermissionError(13, "denied", str(folder))))
        start(manager, 30)
        saved = manager.finish()
    assert saved.step == 30
    assert "step_00000030 is written, but older ones cannot be removed: denied" in saved.not_dropped
    assert names(manager) == ["step_00000010", "step_00000020", "step_00000030"]
    start(manager, 40)
    assert manager.finish().not_dropped == ""
    assert names(manager) == ["step_00000030", "step_00000040"]


def test_an_older_one_goes_only_when_the_new_one_is_complete(manager):
    for step in (5, 10):
        save(manager, step)
    start(manager, 15)
    assert names(manager) == [".step_00000015.partial", "step_00000005", "step_00000010"]
    manager.finish()
    assert names(manager) == ["step_00000010", "step_00000015"]


def test_one_of_every_so_many_hours_stays(tmp_path, control, monkeypatch):
    manager = CheckpointManager(tmp_path, control, keep=2, keep_every_hours=1.5)
    for step, hours in enumerate([0.0, 0.5, 1.0, 1.6, 2.0, 3.0, 3.2, 3.3, 3.4], start=1):
        monkeypatch.setattr(time, "time", lambda hours=hours: 1e9 + 3600 * hours)
        save(manager, step)
    assert names(manager) == ["step_00000001", "step_00000004", "step_00000007", "step_00000008", "step_00000009"]


def test_a_checkpoint_of_the_same_step_is_replaced(manager):
    save(manager, 10, FileEngine("old"))
    folder = save(manager, 10, FileEngine("new"))
    assert names(manager) == ["step_00000010"]
    engine = FileEngine()
    manager.load(folder, engine)
    assert engine.value == "new"


@pytest.mark.parametrize("replaces", [1, 2])
def test_a_run_killed_while_it_replaces_a_checkpoint_has_one_of_the_two(manager, monkeypatch, replaces):
    save(manager, 10, FileEngine("old"))
    real, calls = os.replace, iter(range(1, 10))

    def kill(*args):
        if next(calls) == replaces:
            raise KeyboardInterrupt  # not an Exception: like a kill, nothing cleans up after it
        real(*args)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save(manager, 10, FileEngine("new"))
    monkeypatch.undo()
    manager.clean()
    assert names(manager) == ["step_00000010"]
    engine = FileEngine()
    manager.load(manager.resume_from("auto"), engine)
    assert engine.value == "old"


def test_a_half_written_checkpoint_is_never_picked_up_and_is_cleaned(manager):
    whole = save(manager, 10)
    partial = manager.directory / ".step_00000020.partial"
    shutil.copytree(whole, partial)  # killed just before the rename
    assert manager.resume_from("auto") == whole
    manager.clean()
    assert names(manager) == ["step_00000010"]


@pytest.mark.parametrize("killed_at", ["start_save", "os.replace"])
def test_a_run_killed_while_it_saves_leaves_the_earlier_checkpoint(manager, monkeypatch, killed_at):
    whole = save(manager, 10)

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    engine = FileEngine()
    if killed_at == "start_save":
        monkeypatch.setattr(engine, "start_save", kill)
    else:
        monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save(manager, 20, engine)
    monkeypatch.undo()
    assert names(manager) == [".step_00000020.partial", "step_00000010"]
    assert manager.resume_from("auto") == whole
    again = CheckpointManager(manager.directory.parent, manager._control, keep=2)
    save(again, 20)  # the leftover is no obstacle
    assert names(manager) == ["step_00000010", "step_00000020"]


def test_metadata_is_written_last(manager, monkeypatch):
    """Everything else is on disk before the file that marks a checkpoint complete."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    folder = save(manager, 10)
    partial = folder.with_name(f".{folder.name}.partial")
    relative = [os.path.relpath(path, partial) for path in synced]
    assert relative[:3] == ["engine/rank_0.json", "data.json", "metadata.json"]
    assert set(relative[3:]) == {"engine", ".", ".."}


def test_a_full_disk_is_a_clear_error_and_keeps_earlier_checkpoints(manager):
    whole = save(manager, 10)
    with pytest.raises(CheckpointError, match=r"step_00000020 .*earlier ones are kept.*No space left on device"):
        save(manager, 20, FileEngine(disk_full=True))
    assert names(manager) == ["step_00000010"]
    assert manager.resume_from("auto") == whole
    save(manager, 20)  # the manager goes on
    assert names(manager) == ["step_00000010", "step_00000020"]


def test_a_failure_inside_the_distributed_checkpoint_is_a_clear_error(manager, monkeypatch):
    """torch reports what the ranks' writers and readers failed on in an exception that is not an Exception."""
    engine = FileEngine()

    def fail(directory, **kwargs):
        raise CheckpointException("step", {1: (RuntimeError("[Errno 28] No space left on device"), None)})

    monkeypatch.setattr(engine, "start_save", fail)
    monkeypatch.setattr(engine, "load", fail)
    with pytest.raises(CheckpointError, match=r"could not write: \{1: '\[Errno 28\] No space left on device'\}"):
        save(manager, 20, engine)
    assert names(manager) == []
    with pytest.raises(CheckpointError, match=r"cannot load checkpoint .*could not read: \{1: '\[Errno 28\]"):
        manager.load(save(manager, 20), engine)


def test_an_unwritable_place_is_a_clear_error(manager):
    manager.directory.parent.mkdir(exist_ok=True)
    manager.directory.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*directory"):
        save(manager, 10)


def test_a_file_that_may_not_be_read_is_no_reason_to_give_a_checkpoint_up(manager, monkeypatch):
    save(manager, 10)
    newest = save(manager, 20)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(integrity, "checksum_of", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        manager.resume_from("auto")
    assert newest.exists()


def test_never_refuses_a_run_that_has_checkpoints(manager):
    assert manager.resume_from("never") is None
    save(manager, 10)
    with pytest.raises(CheckpointError, match=r"run\.resume=never, but the run already has .*step_00000010"):
        manager.resume_from("never")


def test_a_path_begins_a_new_run_which_then_goes_on_by_itself(manager, control, tmp_path):
    origin = save(manager, 10)
    branch = CheckpointManager(tmp_path / "new", control, keep=2)
    assert branch.resume_from(str(origin)) == origin
    branch.start(RunState(step=12, origin=str(origin)), FileEngine(), {})
    own = branch.finish().folder
    assert branch.resume_from(str(origin)) == own  # the same command again, after a failure
    with pytest.raises(CheckpointError, match="already has"):
        manager.resume_from(str(own))


def test_a_path_that_is_no_checkpoint_is_refused(manager, tmp_path):
    with pytest.raises(CheckpointError, match=r"metadata\.json is missing: .* is not a complete checkpoint"):
        manager.resume_from(str(tmp_path))


def one_of_two_ranks(folder: Path) -> None:
    rank = dist.get_rank()
    manager = CheckpointManager(folder / "run", ControlGroup(TIMEOUT), keep=2)
    manager.start(RunState(step=1), FileEngine(f"of {rank}"), {"of rank": rank})
    good = manager.finish().folder
    # Only rank 1's disk is full; rank 0 must not hang, nor make the checkpoint visible.
    manager.start(RunState(step=2), FileEngine(disk_full=rank == 1), {})
    with pytest.raises(CheckpointError, match="No space left on device"):
        manager.finish()
    # Nor if only rank 1 cannot begin: what rank 0 has begun must not go on.
    engine = FileEngine()
    if rank == 1:
        engine.start_save = mock.Mock(side_effect=OSError("no process left"))
    with pytest.raises(CheckpointError, match="no process left"):
        manager.start(RunState(step=2), engine, {})
    assert rank == 1 or engine.last.abandoned
    assert not manager.pending
    dist.barrier()
    assert [path.name for path in manager.directory.iterdir()] == ["step_00000001"]
    engine = FileEngine()
    state, data_state, _ = manager.load(manager.resume_from("auto"), engine)
    assert (state, data_state) == (RunState(step=1), {"of rank": 0})
    assert engine.value == f"of {rank}"
    # Damage to a file that the other rank verifies is refused at both.
    dist.barrier()
    if rank == 0:
        (good / "engine" / "rank_1.json").write_text("of 2")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"rank_1\.json is damaged: its CRC-32"):
        manager.load(good, engine)
    with pytest.raises(CheckpointError, match=r"no checkpoint of the run is whole: .*rank_1\.json is damaged"):
        manager.resume_from("auto")
    assert manager.stepped_over


def test_ranks_write_one_checkpoint_and_fail_together(tmp_path):
    run_ranks("tests.checkpoints.test_checkpoints:one_of_two_ranks", 2, tmp_path, cpu_only=True)
