"""Files of the DeepSpeed engine's checkpoints that cannot be written, or are not what they say."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dash_dist.deepspeed_engine import checkpoint
from dash_dist.deepspeed_engine.slices import OwnedSlice
from dash_dist.megatron.host_copies import HostCopies

DIMS = SimpleNamespace(rank=0, world_size=1)
IDENTITY = {"layers": 2}
INDEX = {
    "format": 2,
    "run": {"step": 4, "sequence_length": 8, "identity": IDENTITY, "function": {}},
    "updates": 4,
    "shapes": {"w": [6]},
    "frozen": [],
    "slices": {"rank_00000.safetensors": [["w", 0, 6]]},
}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def slice_of(size: int) -> OwnedSlice:
    return OwnedSlice("w", 0, {key: torch.zeros(size) for key in ("weight", "exp_avg", "exp_avg_sq")})


def save(folder: Path, size: int = 6) -> checkpoint.ZeroSave:
    return checkpoint.ZeroSave(folder, [slice_of(size)], INDEX, DIMS, HostCopies())


def test_a_checkpoint_is_complete_only_with_every_file(tmp_path):
    """Whatever kept a file from being written."""
    with mock.patch.object(checkpoint, "save_file", side_effect=RuntimeError("tensors share memory")):
        failing = save(tmp_path)
        with pytest.raises(OSError, match=r"cannot write .*rank_00000\.safetensors: tensors share memory"):
            failing.finish()
    assert not (tmp_path / checkpoint.INDEX).exists()
    assert save(tmp_path).finish().keys() == {"rank_00000.safetensors"}
    assert (tmp_path / checkpoint.INDEX).exists()


def test_an_abandoned_save_begins_no_file(tmp_path):
    """The next save may write there."""
    begin = threading.Event()
    write = checkpoint.ZeroSave._write

    def write_later(one: checkpoint.ZeroSave, tensors: dict[str, torch.Tensor]) -> None:
        begin.wait()
        write(one, tensors)

    with mock.patch.object(checkpoint.ZeroSave, "_write", write_later):
        one = save(tmp_path)
        one.abandon()
        begin.set()
        one._writer.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["format", "run", "shapes", "slices", "frozen"])
def test_an_index_of_another_program_is_refused_in_words(tmp_path, missing):
    """Rank 0 reads it alone: the others wait for what it says."""
    index = {key: value for key, value in INDEX.items() if key != missing}
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"deepspeed\.json is damaged or of another program: KeyError\('{missing}'\)"):
        checkpoint._read_index(tmp_path, dict(IDENTITY), {"w": [6]})


def test_a_file_with_fewer_elements_than_the_index_says_is_refused_in_words(tmp_path):
    save(tmp_path, size=4).finish()
    with pytest.raises(ValueError, match=r"cannot read .*rank_00000\.safetensors"):
        checkpoint._read_slices(tmp_path, INDEX["slices"], (), [slice_of(6)])
