"""Curves, pictures and texts of a run in TensorBoard.

Knows the names of the curves; does not know how their values are computed. One process of a run writes.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dash_dist.data.stream import SourceProgress
from dash_dist.engine.exchange_statistics import ExchangeStatistics
from dash_dist.engine.routing import LayerRouting
from dash_dist.engine.selection_map import SelectionMap
from dash_dist.run.curve_names import FINAL_METRICS, Chart

_GIB = 1 << 30
_LONGEST_WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one optimizer step.

    Attributes:
        loss: mean over the tokens of the global batch that count in it, in nats.
        tokens: tokens of all global batches so far, including this one, each counted once, without padding.
        tokens_per_second_per_gpu: tokens of the global batch / step_seconds / ranks (processes, where there is no GPU).
        model_tflops_per_gpu: floating-point operations of the model, in 1e12 per second and GPU.
        mfu: model FLOPs utilisation, a share of the bf16 peak; None if that peak is unknown.
        skipped_documents: documents without text, damaged or too long, since the start of the run.
        sources: title -> use of the source since the start of the run.
        padding: share of the tokens of this global batch that are padding.
        memory: name -> GiB, the maximum over the ranks.
        seconds: part of the step (`curve_names.PARTS`) -> mean over the ranks. All parts but "save" add up to the step.
        seconds_max: part -> maximum over the ranks.
        further: name of a curve -> value, see `StepResult.curves`.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    step_seconds: float
    tokens_per_second_per_gpu: float
    model_tflops_per_gpu: float
    mfu: float | None
    skipped_documents: int
    sources: Mapping[str, SourceProgress]
    padding: float
    memory: Mapping[str, float]
    seconds: Mapping[str, float]
    seconds_max: Mapping[str, float]
    further: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOutMetrics:
    """Loss on the held-out sequences after one step.

    Attributes:
        loss: mean over all tokens, in nats.
        by_position: name of a bucket, such as 0-4096 -> mean over its tokens; without empty buckets.
        seconds: duration of the evaluation.
    """

    step: int
    loss: float
    by_position: Mapping[str, float]
    seconds: float


class MetricsWriter:
    """Writes curves into `directory`.

    Args:
        start_step: steps done before. Curves that a killed run logged after it are purged.
    """

    def __init__(self, directory: Path, *, start_step: int) -> None:
        _wait_for_a_later_name(directory)
        self._writer = SummaryWriter(log_dir=str(directory), purge_step=start_step + 1)
        self._start_step = start_step

    def describe(self, config: str, settings: Mapping[str, object], pages: Mapping[str, Mapping[str, Chart]]) -> None:
        """Write the run's configuration as YAML, its hyperparameters, and the pages of its curves."""
        code = "\n".join(f"    {line}" for line in config.splitlines())  # a block of code in Markdown
        self._writer.add_text("config", code, self._start_step)
        self._writer.add_custom_scalars(pages)
        # add_hparams would create a separate run. The plugin shows the last values of the metrics' curves.
        experiment, start, _ = hparams(hyperparameters(settings), dict.fromkeys(FINAL_METRICS))
        for summary in (experiment, start):
            self._writer._get_file_writer().add_summary(summary)

    def finished(self) -> None:
        """Mark the run as finished."""
        _, _, end = hparams({}, {})
        self._writer._get_file_writer().add_summary(end)

    def step(self, metrics: StepMetrics) -> None:
        scalars = {
            "train/loss": metrics.loss,
            "train/grad_norm": metrics.grad_norm,
            "train/learning_rate": metrics.learning_rate,
            "train/tokens": metrics.tokens,
            "perf/step_seconds": metrics.step_seconds,
            "perf/tokens_per_second_per_gpu": metrics.tokens_per_second_per_gpu,
            "perf/model_tflops_per_gpu": metrics.model_tflops_per_gpu,
            "data/skipped_documents": metrics.skipped_documents,
            "data/padding": metrics.padding,
            **{f"data/tokens/{_tag(title)}": source.tokens for title, source in metrics.sources.items()},
            **{
                f"data/loss_tokens/{_tag(title)}": source.loss_tokens
                for title, source in metrics.sources.items()
                if source.loss_tokens is not None
            },
            **{f"data/epochs/{_tag(title)}": source.epochs for title, source in metrics.sources.items()},
            **{f"memory/{name}": gib for name, gib in metrics.memory.items()},
            **{f"time/{part}": seconds for part, seconds in metrics.seconds.items()},
            **{f"time_max/{part}": seconds for part, seconds in metrics.seconds_max.items()},
            **metrics.further,
        }
        if metrics.mfu is not None:
            scalars["perf/mfu"] = metrics.mfu
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, metrics.step)

    def routing(self, step: int, layers: Collection[LayerRouting]) -> None:
        """Write, per layer, the density and a histogram of the chunks that a (token, KV head) pair selected."""
        if layers:
            self._writer.add_scalar("routing/mean_density", fmean(layer.density for layer in layers), step)
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

    def heldout(self, metrics: HeldOutMetrics) -> None:
        """Write the loss on the held-out sequences, in all and by position."""
        self._writer.add_scalar("heldout/loss", metrics.loss, metrics.step)
        self._writer.add_scalar("heldout/seconds", metrics.seconds, metrics.step)
        for bucket, loss in metrics.by_position.items():
            self._writer.add_scalar(f"heldout/loss/{bucket}", loss, metrics.step)

    def heat_maps(self, step: int, maps: Iterable[SelectionMap], *, sequence_length: int) -> None:
        """Write one heat map per layer of the key chunks that the query chunks selected."""
        from dash_dist.training.telemetry.heat_map import (
            heat_map,  # loads Matplotlib, which the other ranks have no use for
        )

        for layer in maps:
            picture = heat_map(layer, sequence_length=sequence_length)
            self._writer.add_image(f"routing/heat_map/layer_{layer.layer}", picture, step, dataformats="HWC")

    def exchange(self, step: int, statistics: ExchangeStatistics) -> None:
        """Write the exchange statistics of a step over all ranks; missing values are left out."""
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
        """Write the number of events of each kind so far, and the text of the new (kind, message) `events`."""
        for kind, count in counts.items():
            self._writer.add_scalar(f"fault/{kind}", count, step)
        for kind, message in events:
            self._writer.add_text(f"fault/{kind}", message, step)

    def flush(self) -> None:
        """Make everything written so far visible to a reader."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _tag(title: str) -> str:
    """Return the title of a source as a part of a curve's name."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in title)


def _wait_for_a_later_name(directory: Path) -> None:
    """Return when a new file's name sorts after those of the files in `directory`.

    Readers sort files by name, which begins with the second of their creation, and the last one purges steps of the
    earlier ones. The clock of another node may be slightly ahead.
    """
    begun = [int(name.split(".")[3]) for name in (file.name for file in directory.glob("events.out.tfevents.[0-9]*.*"))]
    time.sleep(min(max(0.0, max(begun, default=0) + 1 - time.time()), _LONGEST_WAIT_SECONDS))


def hyperparameters(settings: Mapping[str, object]) -> dict[str, float | str | bool]:
    """Flatten a configuration to `section.key` -> value, for the hyperparameters plugin; None is left out."""
    flat: dict[str, float | str | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in hyperparameters(value).items()}
        elif value is not None:
            flat[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
