"""GPUs and machines: published peaks, and the links between GPUs from `dash_dist.cost_model.links`.

Knows rates; does not know what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from dash_dist.cost_model.links import LATENCY, NETWORK_RATE, NVLINK_PUBLISHED, NVLINK_SHARE, Links


@dataclass(frozen=True)
class Gpu:
    """One GPU of a kind.

    Attributes:
        name: as `--gpu` takes it.
        flops: dense bfloat16 peak, FLOP/s, published.
        bandwidth: of its memory, bytes/s, published.
        memory: GiB that `torch.cuda` reports, measured; of a GPU that was not, 99 % of what it is sold with.
        nvlink: bytes/s that one GPU sends to the others of its node, `NVLINK_SHARE` of the published rate.
        attention_time: of the DashAttention kernels, relative to an H200, where they were tuned and measured; of GPUs
            on which they were not measured, the ratio of the peaks.
        host_rate: bytes/s between the GPU and pinned host memory, in one direction; assumed, 80 % of PCIe's 16 lanes.
        measured: the kernels were measured on it (docs/results).
        fp8: it has matrix units for FP8, of twice the bfloat16 peak.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    nvlink: float
    attention_time: float
    measured: bool
    host_rate: float = 50e9
    fp8: bool = True


# Peaks: NVIDIA's data sheets of the SXM form (H100, H200, A100 80GB, B200: HGX B200), dense, without sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # attention_time: rows of h100_64k.json over those of h200_64k.json, stage 3 forward.
        Gpu("H100", 989e12, 3.35e12, 79.2, NVLINK_SHARE * NVLINK_PUBLISHED["H100"], 1.02, measured=True),
        Gpu("H200", 989e12, 4.8e12, 139.8, NVLINK_SHARE * NVLINK_PUBLISHED["H200"], 1.0, measured=True),
        Gpu(
            "A100",
            312e12,
            2.039e12,
            79.2,
            NVLINK_SHARE * NVLINK_PUBLISHED["A100"],
            989 / 312,
            measured=False,
            host_rate=25e9,
            fp8=False,
        ),
        Gpu("B200", 2250e12, 8.0e12, 178.0, NVLINK_SHARE * NVLINK_PUBLISHED["B200"], 989 / 2250, measured=False),
    )
}


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run and what connects them.

    Attributes:
        gpus: of the whole run.
        gpus_per_node: GPUs with NVLink between them.
        memory: bytes of one GPU.
        network: bytes/s that one GPU sends to other nodes.
        latency: seconds of starting a collective.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    memory: float
    network: float = NETWORK_RATE
    latency: float = LATENCY

    @property
    def links(self) -> Links:
        return Links(self.latency, self.gpu.nvlink, self.network, self.gpu.bandwidth)

    def ranks_per_node(self, size: int, stride: int) -> int:
        """Return the number of ranks that share a node, in a group of `size` ranks that lie `stride` apart."""
        if stride >= self.gpus_per_node:
            return 1
        return min(size, max(self.gpus_per_node // stride, 1))
