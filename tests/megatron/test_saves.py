"""Every rank saves and reads its own state alone, and a checkpoint is the same whatever layout wrote it."""

import errno
import io
import operator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dash_dist.checkpoints.pickles import INDEX, FileSection, read_index
from tests.support.models import Case
from tests.support.ranks import run_ranks

SHARDED = Case(distributed_optimizer=True)
BUCKETS = replace(SHARDED, overlap_gradients=True)
TIED = replace(SHARDED, tie_embeddings=True)
ALONE = {"alone": SHARDED, "alone, tied": TIED, "alone, whole": replace(SHARDED, distributed_optimizer=False)}
# Tied: with the embedding at one end alone, the middle of the parameters is within one.
ON_TWO = {
    "dp 2": TIED,
    "dp 2, buckets": replace(TIED, overlap_gradients=True),
    "cp 2": replace(TIED, context=2),
    "dp 2, whole": replace(TIED, distributed_optimizer=False),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint, of which each number is in one block."""
    index = read_index(folder / INDEX)
    tensors = {}
    for name, tensor in index.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        tensors[name] = torch.full(tensor.size, torch.nan, dtype=tensor.properties.dtype)
    for key, place in index.storage_data.items():
        with (folder / place.relative_path).open("rb") as file:
            section = io.BufferedReader(FileSection(file, place.offset, place.length))
            block = torch.load(section, weights_only=True)
        assert block.untyped_storage().nbytes() == block.nbytes  # nothing but the block is in the file
        target = tensors[key.fqn][tuple(map(slice, key.offset, map(operator.add, key.offset, block.shape)))]
        assert target.isnan().all()
        target.copy_(block)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        found = actual[name]
        rows = min(len(found), len(tensor))  # the vocabulary is padded to a multiple of the tensor-parallel ranks
        assert torch.equal(found[:rows], tensor[:rows]), name
        assert not found[rows:].any()
        assert not tensor[rows:].any()


def test_a_rank_writes_its_share_and_gets_nothing_of_the_others(tmp_path: Path) -> None:
    by_rank = run_ranks("tests.megatron.saves_jobs:shares", 2, ON_TWO, tmp_path, cpu_only=True)
    for name, case in ON_TWO.items():
        first, second = (rank[name] for rank in by_rank)
        replicated = first.weights if case.distributed_optimizer else first.weights + first.state
        own = [rank.state if case.distributed_optimizer else 0 for rank in (first, second)]
        assert first.written + second.written == replicated + sum(own), name
        for rank, state in zip((first, second), own, strict=True):
            assert rank.written - state == pytest.approx(replicated / 2, rel=0.05), name
            assert rank.exchanged < 2000, name  # that the directory exists
        assert (first.in_rows + second.in_rows > 0) == case.distributed_optimizer, name
    for name in ON_TWO:
        assert stored(tmp_path / name)  # complete


def test_the_rank_that_cannot_read_a_checkpoint_is_named_at_every_rank(tmp_path: Path) -> None:
    job = "tests.megatron.saves_jobs:load_where_a_rank_cannot_read"
    for error in run_ranks(job, 2, SHARDED, tmp_path / "checkpoint", 1, cpu_only=True):
        assert error is not None
        assert error.errno == errno.EIO
        assert "cannot be read: rank 1: [Errno 5] Input/output error" in str(error)


@pytest.mark.slow
def test_a_checkpoint_is_the_same_at_every_layout(tmp_path: Path) -> None:
    """Loaded and saved again without a step, layout after layout, every weight and moment keeps all its bits.

    One rank writes whole parameters, as all ranks did in the versions that gathered them.
    """
    run_ranks("tests.megatron.saves_jobs:train_and_save", 1, ALONE, tmp_path, cpu_only=True)
    for name, tensor in read_index(tmp_path / "alone" / INDEX).state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        if name.startswith("optimizer"):
            assert len(tensor.chunks) == (2 if name.endswith("linear_fc1.weight") else 1), name  # SwiGLU's halves
    plain = replace(SHARDED, distributed_optimizer=False)
    on_four = [
        ("alone", "dp 4", SHARDED),
        ("dp 4", "dp 4, buckets", BUCKETS),
        ("dp 4, buckets", "tp 2, dp 2, buckets", replace(BUCKETS, tensor=2)),
        ("tp 2, dp 2, buckets", "pp 2, cp 2, buckets", replace(BUCKETS, pipeline=2, context=2)),
        ("pp 2, cp 2, buckets", "tp 2, pp 2", replace(SHARDED, tensor=2, pipeline=2)),
        ("tp 2, pp 2", "cp 4", replace(SHARDED, context=4)),
        ("alone, tied", "pp 2, dp 2, tied", replace(TIED, pipeline=2)),
        ("pp 2, dp 2, tied", "tp 2, pp 2, tied, buckets", replace(TIED, tensor=2, pipeline=2, overlap_gradients=True)),
        ("alone, whole", "dp 4, whole", plain),
        ("dp 4, whole", "tp 2, dp 2, whole", replace(plain, tensor=2)),
    ]
    on_two = [
        ("cp 4", "cp 2", replace(SHARDED, context=2)),
        ("cp 2", "tp 2", replace(SHARDED, tensor=2)),
        ("tp 2, pp 2, tied, buckets", "dp 2, tied", TIED),
        ("tp 2, dp 2, whole", "pp 2, whole", replace(plain, pipeline=2)),
    ]
    again = [
        ("tp 2", "alone again", SHARDED),
        ("dp 2, tied", "alone again, tied", TIED),
        ("pp 2, whole", "alone again, whole", plain),
    ]
    expected = {name: stored(tmp_path / name) for name in ALONE}
    for tensors in expected.values():
        assert all(tensor.any() for tensor in tensors.values())
    for ranks, steps in ((4, on_four), (2, on_two), (1, again)):
        for seen in run_ranks("tests.megatron.saves_jobs:load_and_save", ranks, steps, tmp_path, cpu_only=True):
            assert all(read == owned for read, owned in seen)
        for _, name, case in steps:
            source = "alone, tied" if case.tie_embeddings else "alone" if case.distributed_optimizer else "alone, whole"
            assert_same(stored(tmp_path / name), expected[source])
