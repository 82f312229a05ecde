"""Moments on the host change no bit of a run, of its checkpoints and of their resume."""

from pathlib import Path

import pytest
import torch

from dash_dist.config.optimizer import OptimizerConfig, check_offload
from dash_dist.config.parallel import ParallelConfig
from tests.support.models import Case
from tests.support.ranks import run_ranks

CASE = Case(distributed_optimizer=True, grad_clip=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_and_resumes_are_bit_for_bit_those_of_the_device(tmp_path: Path, ranks: int) -> None:
    by_rank = run_ranks("tests.megatron.host_moments_jobs:train_save_and_resume", ranks, CASE, tmp_path, cpu_only=True)
    for seen in by_rank:
        losses, weights, updates = seen["run 0.0"]
        assert updates == 0
        assert len(set(losses)) == 5
        for share in (0.5, 1.0):
            others, found, updates = seen[f"run {share}"]
            assert others == losses
            assert updates > 0
            assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))
        assert seen["run 0.5"][2] < seen["run 1.0"][2]
        for name in ("resumed 1.0 0.0", "resumed 0.0 1.0", "resumed 0.5 1.0"):
            others, found = seen[name]
            assert others == losses[3:], name
            assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))
        others, found = seen["resumed fused"]
        assert others == pytest.approx(losses[3:], rel=1e-5)
        for one, other in zip(found, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))


def test_too_little_host_memory_is_an_error() -> None:
    case = Case(distributed_optimizer=True, offload_moments=1.0)
    (message,) = run_ranks("tests.megatron.host_moments_jobs:too_little_memory", 1, case, cpu_only=True)
    assert message.startswith("optimizer.offload_moments needs 0.0 GiB of host memory at this rank")
    assert "lower optimizer.offload_moments" in message


def test_engines_that_keep_their_state_on_the_device_are_refused() -> None:
    optimizer, parallel = OptimizerConfig(lr=1e-3, offload_moments=0.5), ParallelConfig()
    check_offload(optimizer, parallel, "megatron")
    check_offload(OptimizerConfig(lr=1e-3), parallel, "deepspeed")
    with pytest.raises(ValueError, match=r"offload_moments is 0\.5, and engine: deepspeed .* set engine to megatron"):
        check_offload(optimizer, parallel, "deepspeed")
    with pytest.raises(ValueError, match="distributed_optimizer to true"):
        check_offload(optimizer, ParallelConfig(distributed_optimizer=False), "megatron")
