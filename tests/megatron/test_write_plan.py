"""The division of tensors among ranks, their copies on the host, and the index's check."""

import errno
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from dash_dist.megatron import write_plan
from dash_dist.megatron.host_copies import HostCopies


def sharded(name: str, *shape: int, replica: tuple[int, int, int] = (0, 0, 0)) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(name, torch.zeros(shape), replica_id=replica)


def test_ranks_divide_tensors_by_their_bytes() -> None:
    tensors = [sharded(f"{size}", size) for size in (3, 50, 20, 7, 21, 10, 9)]
    shares = []
    for rank in range(3):
        with (
            mock.patch.object(write_plan.dist, "get_rank", return_value=rank),
            mock.patch.object(write_plan.dist, "get_world_size", return_value=3),
        ):
            shares.append(write_plan.share_of(tensors, mock.Mock()))
    assert sorted(one.key for share in shares for one in share) == sorted(one.key for one in tensors)
    assert [sum(one.data.numel() for one in share) for share in shares] == [50, 37, 33]


def test_one_copy_of_a_tensor_is_written_whatever_its_data_parallel_rank() -> None:
    copies = [(0, 0, 0), (0, 0, 3), (0, 1, 0), (1, 0, 0)]
    tensors = [sharded(f"{replica}", 2, replica=replica) for replica in copies]
    assert [one.replica_id for one in write_plan.first_copies(tensors)] == copies[:2]


@pytest.mark.parametrize("background", [True, False])
def test_memory_that_a_forked_process_shares_is_not_copied_unless_a_gpu_writes_to_it(
    tmp_path: Path, background: bool
) -> None:
    kept, changing = torch.arange(6.0), torch.arange(4.0)
    tensors = [ShardedTensor.from_rank_offsets(name, one) for name, one in (("kept", kept), ("changing", changing))]
    with (
        mock.patch.object(write_plan.dist, "get_rank", return_value=0),
        mock.patch.object(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() == changing.data_ptr()),
    ):
        plan = write_plan.WritePlan(tmp_path, tensors, None, HostCopies() if background else None)
    of_kept, of_changing = plan._tensors
    assert of_kept.data_ptr() == kept.data_ptr()
    assert (of_changing.data_ptr() == changing.data_ptr()) == (not background)
    assert torch.equal(of_changing, changing)


@pytest.mark.parametrize(("rows", "found"), [(3, 6), (5, 10)])
def test_an_index_whose_blocks_are_not_the_tensor_is_refused(rows: int, found: int) -> None:
    block = ShardedTensor("moment", torch.zeros(rows, 2), torch.float32, (rows, 2), (4, 2), (0, 0), None)
    with pytest.raises(ValueError, match=f"the ranks wrote {found} numbers of moment, which has 8"):
        write_plan._described([write_plan._item_of(block)])


def test_a_part_of_a_tensor_is_written_without_the_rest_and_without_a_copy() -> None:
    part = torch.arange(12, dtype=torch.bfloat16)[3:9].view(2, 3)
    alone = write_plan._alone(part)
    assert torch.equal(alone, part)
    assert alone.data_ptr() == part.data_ptr()
    assert alone.untyped_storage().nbytes() == part.nbytes


def test_a_full_disk_is_told_as_such_whatever_torch_makes_of_it() -> None:
    with (
        pytest.raises(OSError, match="No space left on device") as raised,
        write_plan._ChecksummedFile(Path("/dev/full")) as file,
    ):
        torch.save(torch.zeros(100_000), file)
    assert raised.value.errno == errno.ENOSPC
