"""Damaged and malicious checkpoints of a real run: refused or stepped over, in words that name the file."""

import enum
import os
import pickle
import random
import shutil
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from dash_dist.checkpoints.folders import HIDDEN_STATES, hidden_checkpoints
from dash_dist.checkpoints.integrity import CheckpointMetadata, read_metadata, write_metadata
from dash_dist.checkpoints.pickles import UnsafeFile, read_index
from dash_dist.cli import app
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import CheckpointError
from dash_dist.run.events import EventLog
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.faults.rollback import checkpoint_before
from tests.checkpoints.checkpoint_files import DAMAGES, files_of, with_right_checksums
from tests.support.ranks import run_ranks
from tests.support.runs import losses, write_config

SEEDS = 20
"""Of each of the five kinds of damage."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one rank: `whole` with checkpoints of steps 2 and 4, and `other` of another model."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks("tests.checkpoints.checkpoint_jobs:runs_to_damage", 1, write_config(folder), cpu_only=True)
    return folder


@pytest.fixture(scope="module")
def control():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ControlGroup(timedelta(seconds=30))
    dist.destroy_process_group()


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run that may be damaged."""
    shutil.copytree(folder / "runs" / "whole" / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def newest(run):
    return run / "checkpoints" / "step_00000004"


def previous(run):
    return run / "checkpoints" / "step_00000002"


def assert_refused_and_stepped_over(run, control, *messages):
    """Each of `messages` is part of what is said, by a run that names the checkpoint and by one that comes upon it."""
    manager = CheckpointManager(run, control, keep=2)
    with pytest.raises(CheckpointError) as refused:
        CheckpointManager(run.with_name("new"), control, keep=2).resume_from(str(newest(run)))
    before = len(EventLog(run).read())
    assert manager.resume_from("auto") == previous(run)
    (said,) = manager.stepped_over
    assert any(message in said for message in messages), (messages, said)
    assert any(message in str(refused.value) for message in messages), (messages, refused.value)
    event = EventLog(run).read()[before]
    assert (event.kind, event.step, event.message) == ("checkpoint_damaged", 4, said)
    assert not newest(run).exists()
    assert (run / "checkpoints" / ".step_00000004.damaged").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_and_stepped_over(folder, tmp_path, control, kind):
    for seed in range(SEEDS):
        run = tmp_path / f"run_{seed}"
        shutil.copytree(folder / "runs" / "whole" / "checkpoints", run / "checkpoints")
        damaged = DAMAGES[kind](
            newest(run),
            random.Random(f"{kind} {seed}"),
            previous(run),
            folder / "runs" / "other" / "checkpoints" / "step_00000004",
        )
        assert_refused_and_stepped_over(run, control, *map(str, damaged))


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(folder):
    runs = folder / "runs"
    shutil.copytree(runs / "whole", runs / "again")
    shutil.rmtree(runs / "again" / "tensorboard")
    file = newest(runs / "again") / "engine" / "common.pt"
    file.write_bytes(b"")
    (outcome,) = run_ranks(
        "tests.support.attempts:attempt",
        1,
        folder / "tiny.yaml",
        "run.name=again",
        "parallel.context=1",
        "training.steps=4",
        cpu_only=True,
    )
    assert outcome.error == ""
    assert f"{file} is damaged: it has 0 bytes" in " ".join(outcome.output.split())
    expected = losses(runs / "whole")
    assert losses(runs / "again") == {step: expected[step] for step in (3, 4)}
    assert (runs / "again" / "checkpoints" / ".step_00000004.damaged" / "engine" / "common.pt").is_file()


def test_without_any_whole_checkpoint_a_run_does_not_begin_anew(run, control):
    for checkpoint in (newest(run), previous(run)):
        (checkpoint / "engine" / "common.pt").unlink()
    manager = CheckpointManager(run, control, keep=2)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of the run is whole: .*4/engine/common\.pt is missing.*2/"
    ):
        manager.resume_from("auto")
    assert len(EventLog(run).read()) == 2


def test_what_is_set_aside_is_never_overwritten(run, control, folder):
    for _ in range(2):
        shutil.copytree(newest(folder / "runs" / "whole"), newest(run), dirs_exist_ok=True)
        (newest(run) / "data.json").unlink()
        CheckpointManager(run, control, keep=2).resume_from("auto")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step_00000002", ".step_00000004.damaged", ".step_00000004.damaged-2"}


def test_checkpoints_that_a_rollback_goes_back_behind_are_set_aside_under_a_name_of_their_own(run, control):
    manager = CheckpointManager(run, control, keep=2)
    older = run / "checkpoints" / "step_00000002"
    assert checkpoint_before(manager, control, 3, start=None) == older
    assert {path.name for path in (run / "checkpoints").iterdir()} == {older.name, ".step_00000004.rolled_back"}
    (hidden,) = hidden_checkpoints(run / "checkpoints")
    assert HIDDEN_STATES[hidden[1]] == "set aside by a rollback"
    assert checkpoint_before(manager, control, 1, start=None) is None


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def replace_common(engine, payload):
    state = torch.load(engine / "common.pt")
    torch.save({**state, "payload": payload}, engine / "common.pt")
    return "common.pt"


def replace_index(engine, payload):
    (engine / ".metadata").write_bytes(pickle.dumps(payload))
    return ".metadata"


def hide_in_index(engine, payload):
    index = read_index(engine / ".metadata")
    index.planner_data = {"payload": payload}
    (engine / ".metadata").write_bytes(pickle.dumps(index))
    return ".metadata"


def replace_a_tensor(engine, payload):
    index = read_index(engine / ".metadata")
    key, place = next(iter(index.storage_data.items()))
    shards = engine / place.relative_path
    with shards.open("r+b") as file:
        place.offset = file.seek(0, os.SEEK_END)
        torch.save(payload, file)
        place.length = file.tell() - place.offset
    index.storage_data[key] = place
    (engine / ".metadata").write_bytes(pickle.dumps(index))
    return shards.name


@pytest.mark.parametrize("place", [replace_common, replace_index, hide_in_index, replace_a_tensor])
def test_nothing_that_a_stranger_wrote_is_run(run, control, tmp_path, place):
    marker = tmp_path / "payload_was_run"
    payload = Payload(marker)
    file = place(newest(run) / "engine", payload)
    with_right_checksums(newest(run))
    assert_refused_and_stepped_over(run, control, f"engine/{file} is not safe to load: it names posix.system")
    assert not marker.exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()  # it does what it says


def test_a_file_that_the_metadata_leaves_out_is_never_read(run, control, tmp_path):
    """Nothing verifies it, and an engine would unpickle it."""
    file = newest(run) / "engine" / ".metadata"
    file.write_bytes(pickle.dumps(Payload(tmp_path / "payload_was_run")))
    old = read_metadata(newest(run))
    listed = {name: checksum for name, checksum in old.files.items() if name != "engine/.metadata"}
    write_metadata(newest(run), CheckpointMetadata(old.state, old.saved_at, listed))
    assert f"{file} is not safe to load" in call("verify", newest(run)).stdout
    assert_refused_and_stepped_over(run, control, "engine/.metadata is not safe to load: metadata.json does not list")
    assert not (tmp_path / "payload_was_run").exists()


def make_an_object_of_a_tensor(engine):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = read_index(engine / ".metadata")
    index.state_dict_metadata["optimizer"] = BytesStorageMetadata()
    (engine / ".metadata").write_bytes(pickle.dumps(index))
    return ".metadata is not safe to load: it names torch.distributed.checkpoint.metadata.BytesStorageMetadata"


def point_elsewhere(engine):
    index = read_index(engine / ".metadata")
    next(iter(index.storage_data.values())).relative_path = "../../step_00000002/engine/__0_0.distcp"
    (engine / ".metadata").write_bytes(pickle.dumps(index))
    return ".metadata is damaged: it names the file '../../step_00000002/engine/__0_0.distcp'"


def point_beyond_the_end(engine):
    index = read_index(engine / ".metadata")
    next(iter(index.storage_data.values())).length = 10**9
    (engine / ".metadata").write_bytes(pickle.dumps(index))
    return "would be beyond the end of __0_0.distcp"


def write_garbage(engine):
    (engine / "common.pt").write_bytes(bytes(range(256)))
    return "common.pt is damaged: not an archive of tensors"


def write_a_list_for_the_data(engine):
    (engine.parent / "data.json").write_text("[]")
    return "data.json is damaged: it is not a JSON object"


@pytest.mark.parametrize(
    "change",
    [
        make_an_object_of_a_tensor,
        point_elsewhere,
        point_beyond_the_end,
        write_garbage,
        write_a_list_for_the_data,
    ],
)
def test_what_no_run_writes_is_refused_although_its_checksums_are_right(run, control, change):
    message = change(newest(run) / "engine")
    with_right_checksums(newest(run))
    assert_refused_and_stepped_over(run, control, message)


def call(command, *arguments):
    group = [] if command == "export" else ["checkpoint"]
    return CliRunner().invoke(app, [*group, command, *map(str, arguments)], env={"COLUMNS": "200"})


def test_list_shows_every_checkpoint_and_its_state(run):
    shutil.copytree(newest(run), newest(run).with_name(".step_00000006.partial"))
    shutil.copytree(newest(run), newest(run).with_name(".step_00000001.damaged-2"))
    os.truncate(newest(run) / "engine" / "common.pt", 7)
    result = call("list", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [
        "step_00000002",
        "step_00000004",
        ".step_00000001.damaged-2",
        ".step_00000006.partial",
    ]
    assert "1,024" in lines[1]
    assert "complete" in lines[1]
    assert "damaged: engine/common.pt is damaged: it has 7 bytes" in lines[2]
    assert "set aside as damaged" in lines[3]
    assert "being written, or left behind" in lines[4]


def test_verify_names_every_damaged_file(run):
    assert call("verify", run).exit_code == 0
    os.truncate(newest(run) / "data.json", 7)
    (newest(run) / "engine" / "metadata.json").unlink()
    (previous(run) / "metadata.json").write_text("{")
    for path, expected in ((run, 3), (newest(run), 2), (run / "checkpoints", 3)):
        result = call("verify", path)
        assert result.exit_code == 1
        assert len(result.stdout.splitlines()) == expected
    assert f"{newest(run)}/data.json is damaged: it has 7 bytes" in result.stdout
    assert f"{newest(run)}/engine/metadata.json is missing" in result.stdout
    assert f"{previous(run)}/metadata.json is damaged" in result.stdout


@pytest.mark.parametrize("arguments", [("list", "nowhere"), ("verify", "nowhere"), ("export", "nowhere", "out")])
def test_a_path_that_is_no_checkpoint_is_said_so(tmp_path, arguments):
    command, path, *rest = arguments
    result = call(command, tmp_path / path, *(tmp_path / name for name in rest))
    assert isinstance(result.exception, CheckpointError)
    assert "nowhere" in str(result.exception)


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    os.truncate(files_of(newest(run))[0], 7)
    result = call("export", newest(run), tmp_path / "out")
    assert "__0_0.distcp is damaged" in str(result.exception)
    assert not (tmp_path / "out").exists()


class OfAnOldPython(pickle.Pickler):
    """Pickles a member of an enumeration as Python before 3.11.4 does: by getattr."""

    def reducer_override(self, obj):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_an_index_that_an_old_python_wrote_is_read(run, tmp_path):
    index = read_index(newest(run) / "engine" / ".metadata")
    with (tmp_path / ".metadata").open("wb") as file:
        OfAnOldPython(file).dump(index)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert read_index(tmp_path / ".metadata") == index


def test_getattr_of_anything_else_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return getattr, ("text", "format")

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UnsafeFile, match="it asks for 'format' of 'text'"):
        read_index(tmp_path / ".metadata")
