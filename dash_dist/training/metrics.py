"""The curves of a run in TensorBoard, and the memory and peak-speed figures of the device behind them.

Knows the names of the curves; does not know how a step computes what it reports. One process of a run writes.
"""

import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from dash_dist.megatron import ExchangeStatistics, LayerRouting

# Dense bf16 peak in FLOP/s as published by NVIDIA for the SXM form (L40S: PCIe), by a part of the device's name; the
# first match counts.
_PEAK_BF16_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}

_GIB = 1 << 30


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        loss: mean over the tokens of the global batch, in nats.
        tokens: of all global batches so far, this one included, each counted once.
        tokens_per_second_per_gpu: tokens of the global batch / step_seconds / ranks (processes, where there is no GPU).
        mfu: model FLOPs utilisation, a share of the bf16 peak; None where that peak is unknown.
        skipped_documents: empty and undecodable ones passed over since the start of the run, at all ranks.
        padding: share of the tokens of this global batch that are padding.
        memory: name -> GiB, the largest of all ranks.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    skipped_documents: int
    padding: float
    memory: Mapping[str, float]


class MetricsWriter:
    """Writes the curves into `directory`.

    Args:
        start_step: steps done before; what a killed run logged beyond them is purged, and the curves go on from there.
    """

    def __init__(self, directory: Path, *, start_step: int) -> None:
        self._writer = SummaryWriter(log_dir=str(directory), purge_step=start_step + 1)

    def step(self, metrics: StepMetrics) -> None:
        scalars = {
            "train/loss": metrics.loss,
            "train/grad_norm": metrics.grad_norm,
            "train/learning_rate": metrics.learning_rate,
            "train/tokens": metrics.tokens,
            "perf/step_seconds": metrics.step_seconds,
            "perf/tokens_per_second_per_gpu": metrics.tokens_per_second_per_gpu,
            "data/skipped_documents": metrics.skipped_documents,
            "data/padding": metrics.padding,
            **{f"memory/{name}": gib for name, gib in metrics.memory.items()},
        }
        if metrics.mfu is not None:
            scalars["perf/mfu"] = metrics.mfu
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, metrics.step)

    def routing(self, step: int, layers: Iterable[LayerRouting]) -> None:
        """Per layer the density, and a histogram of how many chunks a (token, KV head) pair selected."""
        for routing in layers:
            self._writer.add_scalar(f"routing/density/layer_{routing.layer}", routing.density, step)
            numbers = torch.arange(len(routing.selected), dtype=torch.float64)
            counts = routing.selected.double()
            present = numbers[counts > 0]
            self._writer.add_histogram_raw(
                f"routing/selected_chunks/layer_{routing.layer}",
                min=present.min().item(),
                max=present.max().item(),
                num=counts.sum().item(),
                sum=(numbers * counts).sum().item(),
                sum_squares=(numbers.square() * counts).sum().item(),
                bucket_limits=(numbers + 0.5).tolist(),  # bucket k holds the number k
                bucket_counts=counts.tolist(),
                global_step=step,
            )

    def exchange(self, step: int, statistics: ExchangeStatistics) -> None:
        """What context parallelism moved in a step, over all ranks; nothing of what that step did not have."""
        scalars = {
            "cp/planned_gib": statistics.planned_bytes / _GIB,
            "cp/sent_gib": statistics.sent_bytes / _GIB,
            "cp/slow_link_gib": statistics.slow_link_bytes / _GIB,
            "cp/dense_gib": statistics.dense_bytes / _GIB,
            **{f"cp/coverage/layer_{layer}": coverage for layer, coverage in statistics.coverage.items()},
            **{f"cp/imbalance/{layout}": imbalance for layout, imbalance in statistics.imbalance.items()},
            **{f"cp/exchange/{name}": share for name, share in statistics.exchanges.items()},
        }
        if statistics.overlap is not None:
            scalars["cp/overlap"] = statistics.overlap
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def faults(self, step: int, counts: Mapping[str, int], events: Iterable[tuple[str, str]]) -> None:
        """How many events of each kind there were so far, and the text of the (kind, message) `events` that are new."""
        for kind, count in counts.items():
            self._writer.add_scalar(f"fault/{kind}", count, step)
        for kind, message in events:
            self._writer.add_text(f"fault/{kind}", message, step)

    def flush(self) -> None:
        """Make everything written so far visible to a reader."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def memory_used(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: on GPU the peaks since the last call, on CPU the largest resident set so far."""
    if device.type == "cuda":
        used = {
            "allocated_peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
            "reserved_peak_gib": torch.cuda.max_memory_reserved(device) / _GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return used
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return {"rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}


def peak_bf16_flops(device: torch.device) -> float | None:
    """Published dense bf16 peak of the device in FLOP/s; None for a CPU and for a GPU that is not listed here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _PEAK_BF16_FLOPS.items() if part in name), None)
