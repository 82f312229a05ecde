"""The checkpoints of a run, with an engine that writes one small file."""

import errno
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException

from dash_dist.training.checkpoints import CheckpointManager, RunState, choose_checkpoint
from dash_dist.training.control import ControlGroup
from dash_dist.training.errors import CheckpointError

TIMEOUT = timedelta(seconds=30)


@dataclass
class FileEngine:
    """`value` is all there is to save; `disk_full` fails as a full disk does, with half of the file written."""

    value: str = "weights"
    disk_full: bool = False

    def save(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / f"rank_{dist.get_rank()}.bin").write_text(self.value)
        if self.disk_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))

    def load(self, directory: Path) -> list[str]:
        self.value = (directory / f"rank_{dist.get_rank()}.bin").read_text()
        return [f"now {self.value}"]


@pytest.fixture
def manager(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield CheckpointManager(tmp_path, ControlGroup(TIMEOUT), keep=2)
    dist.destroy_process_group()


def save(manager, step, engine=None):
    return manager.save(RunState(step=step), engine or FileEngine(), [{"rows": [step]}], merge=lambda states: states[0])


def names(manager):
    return sorted(path.name for path in manager.directory.iterdir())


def test_a_checkpoint_gives_back_what_was_saved(manager):
    state = RunState(step=10, tokens=1000, first_loss=5.5, last_loss=2.0, origin="/elsewhere/step_00000001")
    folder = manager.save(
        state,
        FileEngine("w10"),
        [{"a": 1}, {"b": 2}],
        merge=lambda states: {k: v for s in states for k, v in s.items()},
    )
    assert folder == manager.directory / "step_00000010"
    engine = FileEngine("nothing")
    assert manager.load(manager.resume_from("auto"), engine) == (state, {"a": 1, "b": 2}, ["now w10"])
    assert engine.value == "w10"


def test_only_the_latest_stay(manager):
    for step in (5, 10, 15):
        save(manager, step)
    assert names(manager) == ["step_00000010", "step_00000015"]


def test_a_half_written_checkpoint_is_never_picked_up_and_is_cleaned(manager):
    whole = save(manager, 10)
    partial = manager.directory / ".step_00000020.partial"
    shutil.copytree(whole, partial)  # killed just before the rename
    without_metadata = manager.directory / "step_00000030"
    shutil.copytree(whole, without_metadata)
    (without_metadata / "metadata.json").unlink()
    assert manager.resume_from("auto") == whole
    manager.clean()
    assert not partial.exists()
    assert whole.exists()


@pytest.mark.parametrize("killed_at", ["engine.save", "os.replace"])
def test_a_run_killed_while_it_saves_leaves_the_earlier_checkpoint(manager, monkeypatch, killed_at):
    whole = save(manager, 10)

    def kill(*args):
        raise KeyboardInterrupt  # not an Exception: like a kill, nothing cleans up after it

    engine = FileEngine()
    if killed_at == "engine.save":
        monkeypatch.setattr(engine, "save", kill)
    else:
        monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save(manager, 20, engine)
    monkeypatch.undo()
    assert names(manager) == [".step_00000020.partial", "step_00000010"]
    assert manager.resume_from("auto") == whole
    save(manager, 20)  # the leftover is no obstacle
    assert names(manager) == ["step_00000010", "step_00000020"]


def test_metadata_is_written_last(manager, monkeypatch):
    """Everything else is on disk before the file that marks a checkpoint complete."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    folder = save(manager, 10)
    partial = folder.with_name(f".{folder.name}.partial")
    relative = [os.path.relpath(path, partial) for path in synced]
    assert relative[:3] == ["engine/rank_0.bin", "data.json", "metadata.json"]
    assert set(relative[3:]) == {"engine", ".", ".."}


def test_a_full_disk_is_a_clear_error_and_keeps_earlier_checkpoints(manager):
    whole = save(manager, 10)
    with pytest.raises(CheckpointError, match=r"step_00000020 .*earlier ones are kept.*No space left on device"):
        save(manager, 20, FileEngine(disk_full=True))
    assert names(manager) == ["step_00000010"]
    assert manager.resume_from("auto") == whole


def test_a_failure_inside_the_distributed_checkpoint_is_a_clear_error(manager, monkeypatch):
    """torch reports what the ranks' writers and readers failed on in an exception that is not an Exception."""
    engine = FileEngine()

    def fail(directory):
        raise CheckpointException("step", {1: (RuntimeError("[Errno 28] No space left on device"), None)})

    monkeypatch.setattr(engine, "save", fail)
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


@pytest.mark.parametrize("damage", ["flipped", "shortened", "missing"])
def test_a_damaged_file_is_refused(manager, damage):
    folder = save(manager, 10, FileEngine("weights"))
    file = folder / "engine" / "rank_0.bin"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("weighty" if damage == "flipped" else "weigh")
    engine = FileEngine("untouched")
    with pytest.raises(CheckpointError, match=r"rank_0\.bin"):
        manager.load(folder, engine)
    assert engine.value == "untouched"


def test_never_refuses_a_run_that_has_checkpoints(manager):
    assert manager.resume_from("never") is None
    save(manager, 10)
    with pytest.raises(CheckpointError, match=r"run\.resume=never, but the run already has .*step_00000010"):
        manager.resume_from("never")


def test_a_path_begins_a_new_run_which_then_goes_on_by_itself(manager, tmp_path):
    origin = str(save(manager, 10))
    new = tmp_path / "new" / "checkpoints"
    assert choose_checkpoint(new, origin) == Path(origin)
    branch = CheckpointManager(tmp_path / "new", manager._control, keep=2)
    own = branch.save(RunState(step=12, origin=origin), FileEngine(), [{}], merge=lambda states: states[0])
    assert choose_checkpoint(new, origin) == own  # the same command again, after a failure
    with pytest.raises(CheckpointError, match="already has"):
        choose_checkpoint(manager.directory, origin)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint \(no metadata\.json in it\)"):
        choose_checkpoint(tmp_path / "checkpoints", str(tmp_path))


def one_of_two_ranks(folder: Path) -> None:
    rank = dist.get_rank()
    manager = CheckpointManager(folder / "run", ControlGroup(TIMEOUT), keep=2)

    def merge(states):
        return sorted(states)

    good = manager.save(RunState(step=1), FileEngine(f"of {rank}"), [f"data of {rank}"], merge=merge)
    # Only rank 1's disk is full; rank 0 must not hang, nor make the checkpoint visible.
    with pytest.raises(CheckpointError, match="No space left on device"):
        manager.save(RunState(step=2), FileEngine(disk_full=rank == 1), [rank], merge=merge)
    dist.barrier()
    assert [path.name for path in manager.directory.iterdir()] == ["step_00000001"]
    engine = FileEngine()
    state, data_states, _ = manager.load(manager.resume_from("auto"), engine)
    assert (state, data_states) == (RunState(step=1), ["data of 0", "data of 1"])
    assert engine.value == f"of {rank}"
    # Damage to a file that the other rank verifies is refused at both.
    dist.barrier()
    if rank == 0:
        (good / "engine" / "rank_1.bin").write_text("of 2")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"rank_1\.bin is damaged.*run\.resume=PATH and another run\.name"):
        manager.load(good, engine)


def test_ranks_write_one_checkpoint_and_fail_together(tmp_path):
    run_ranks("test_training_checkpoints:one_of_two_ranks", 2, tmp_path, time_limit=90, cpu_only=True)
