"""GPUs and links: published peaks, and what of them was measured to be reached.

Knows rates; does not know what is computed. The one table of the planner's machine constants.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU of a kind.

    Attributes:
        name: as `--gpu` takes it.
        flops: dense bfloat16 peak, FLOP/s, published.
        bandwidth: of its memory, bytes/s, published.
        memory: GiB that `torch.cuda` reports, measured; of a GPU that was not, 99 % of what it is sold with.
        nvlink: bytes/s that one GPU sends to the others of its node, see `NVLINK_SHARE`.
        attention_time: of the DashAttention kernels, relative to an H200, where they were tuned and measured; of GPUs
            on which they were not measured, the ratio of the peaks.
        measured: the kernels were measured on it (docs/results).
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    nvlink: float
    attention_time: float
    measured: bool


NVLINK_SHARE = 0.71
"""Of NVLink's published rate per direction: 320 of 450 GB/s, an all-to-all of two H200 with NCCL's default blocks
(docs/context-parallelism.md: 317 to 324 GB/s)."""

# Peaks: NVIDIA's data sheets of the SXM form (H100, H200, A100 80GB, B200: HGX B200), dense, without sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # attention_time: rows of h100_64k.json over those of h200_64k.json, stage 3 forward.
        Gpu("H100", 989e12, 3.35e12, 79.2, NVLINK_SHARE * 450e9, 1.02, measured=True),
        Gpu("H200", 989e12, 4.8e12, 139.8, NVLINK_SHARE * 450e9, 1.0, measured=True),
        Gpu("A100", 312e12, 2.039e12, 79.2, NVLINK_SHARE * 300e9, 989 / 312, measured=False),
        Gpu("B200", 2250e12, 8.0e12, 178.0, NVLINK_SHARE * 900e9, 989 / 2250, measured=False),
    )
}


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run and what connects them.

    Attributes:
        gpus: of the whole run.
        gpus_per_node: GPUs with NVLink between them.
        memory: bytes of one GPU.
        network: bytes/s that one GPU sends to other nodes: 80 % of a 400 Gb/s adapter for each GPU, as
            `dash_dist.context_parallel.cost.Links` assumes.
        latency: seconds of starting a collective.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    memory: float
    network: float = 40e9
    latency: float = 20e-6

    def ranks_per_node(self, size: int, stride: int) -> int:
        """Return the number of ranks that share a node, in a group of `size` ranks that lie `stride` apart."""
        if stride >= self.gpus_per_node:
            return 1
        return min(size, max(self.gpus_per_node // stride, 1))
