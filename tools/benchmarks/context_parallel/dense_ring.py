"""The peer: PyTorch's own context parallelism, dense causal attention as a ring over cuDNN's or flash attention's SDPA.

`torch.distributed.tensor.experimental.context_parallel` swaps `scaled_dot_product_attention` for a ring of it. Its load
balancer pairs the first piece of 2 x size with the last, the second with the last but one: the zigzag layout. So a
zigzag shard can be given to it as it is, and no rank has to hold the sequence for it to be split. K and V travel by an
all-gather, which is what it does unless told otherwise.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_dist import join_sequence, split_sequence
from tools.benchmarks.common.inputs import Case, Inputs
from tools.benchmarks.context_parallel.inputs import shard_inputs
from tools.benchmarks.context_parallel.ranks import Ranks
from tools.benchmarks.context_parallel.timing import Mark, Step, StepFailedError, no_mark, together

KERNELS = {"dense-cudnn": SDPBackend.CUDNN_ATTENTION, "dense-flash": SDPBackend.FLASH_ATTENTION}
CHECKED_TOKENS = 2048  # per rank
# Relative, Frobenius, in 16 bits; outputs or gradients of other keys differ by 1 or more.
LARGEST_DIFFERENCE = 0.02


@dataclass(frozen=True)
class DenseRing:
    """One of PyTorch's kernels as a ring. repeats_kv: each KV head is repeated for its query heads inside the call,
    which is what it takes where `enable_gqa` does not work under context parallelism.
    """

    kernel: SDPBackend
    repeats_kv: bool

    @property
    def description(self) -> str:
        heads = "KV heads repeated for their query heads" if self.repeats_kv else "enable_gqa"
        return f"PyTorch's context_parallel, all-gather of K and V, {heads}"

    def step(self, case: Case, inputs: Inputs) -> Step:
        """Forward and backward over q, k and v; call it inside `ring`."""
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

        def call(after_forward: Mark) -> Sequence[torch.Tensor]:
            q, k, v = (x.transpose(1, 2) for x in leaves)
            if self.repeats_kv:
                k, v = (x.repeat_interleave(case.group, dim=1) for x in (k, v))
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2)
            after_forward()
            return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)

        return call

    @contextlib.contextmanager
    def ring(self, ranks: Ranks) -> Iterator[None]:
        """Inside it, scaled_dot_product_attention is a ring over the ranks."""
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
        # It wants to split something; our shards come split.
        something = torch.zeros(2 * ranks.size, device=ranks.device)
        with sdpa_kernel([self.kernel]), context_parallel(mesh, buffers=[something], buffer_seq_dims=[0]):
            yield


def find_dense_ring(name: str, case: Case, ranks: Ranks) -> DenseRing:
    """The ring that runs and computes dense attention, with KV heads as they are if it takes them.

    Compared, on a short sequence, with one device's attention of the whole of it; which also compiles and warms up.
    Raises StepFailedError at every rank, with what was wrong, where there is none.
    """
    short = replace(case, seq_len=CHECKED_TOKENS * ranks.size)
    problems = []
    for repeats_kv in (False, True):
        ring = DenseRing(KERNELS[name], repeats_kv)
        try:
            difference = max(together(functools.partial(_difference, ring, short, ranks), ranks))
        except StepFailedError as error:
            problems.append(f"{ring.description}: {error}")
            continue
        if difference <= LARGEST_DIFFERENCE:
            return ring
        problems.append(f"{ring.description}: differs by {difference:.3f} from attention on one device")
    raise StepFailedError("; ".join(problems))


def _difference(ring: DenseRing, case: Case, ranks: Ranks) -> float:
    """Largest relative difference of the rank's output and gradients from one device's; infinity for NaN."""
    inputs = shard_inputs(case, ranks.rank, ranks.size, "zigzag", ranks.device)
    with ring.ring(ranks):
        results = ring.step(case, inputs)(no_mark)
    whole = [join_sequence(x, ranks.group) for x in (inputs.q, inputs.k, inputs.v, inputs.grad)]
    leaves = [x.detach().requires_grad_() for x in whole[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = out.transpose(1, 2), *torch.autograd.grad(out, leaves, whole[3].transpose(1, 2))
    worst = 0.0
    for result, of_whole in zip(results, expected, strict=True):
        own = split_sequence(of_whole, ranks.group).double()
        difference = ((result.double() - own).norm() / own.norm()).item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
