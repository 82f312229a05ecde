import io
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2

from dash_dist.data.stream import SourceProgress
from dash_dist.engine.exchange_statistics import ExchangeStatistics
from dash_dist.engine.routing import LayerRouting
from dash_dist.engine.selection_map import SelectionMap
from dash_dist.run.curve_names import PARTS, pages
from dash_dist.run.events import EVENT_KINDS
from dash_dist.training.telemetry.device import memory_used, peak_bf16_flops
from dash_dist.training.telemetry.metrics import HeldOutMetrics, MetricsWriter, StepMetrics, hyperparameters
from tests.support.runs import read_curves


def step_metrics(step, *, loss=1.0, mfu=None):
    return StepMetrics(
        step=step,
        loss=loss,
        grad_norm=0.5,
        learning_rate=1e-3,
        tokens=100 * step,
        step_seconds=2.0,
        tokens_per_second_per_gpu=25.0,
        model_tflops_per_gpu=0.5,
        mfu=mfu,
        skipped_documents=3,
        sources={"owner/name": SourceProgress(tokens=5, epochs=0.5)},
        padding=0.125,
        memory={"rss_peak_gib": 0.25},
        seconds={"forward": 0.5, "save": 0.25},
        seconds_max={"forward": 0.75, "save": 0.25},
    )


def test_a_step_writes_exactly_these_curves(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.step(step_metrics(1))
    writer.close()
    curves = read_curves(tmp_path)
    values = {tag: curves.Scalars(tag)[0].value for tag in curves.Tags()["scalars"]}
    assert values == pytest.approx(
        {
            "train/loss": 1.0,
            "train/grad_norm": 0.5,
            "train/learning_rate": 1e-3,
            "train/tokens": 100,
            "perf/step_seconds": 2.0,
            "perf/tokens_per_second_per_gpu": 25.0,
            "perf/model_tflops_per_gpu": 0.5,
            "data/skipped_documents": 3,
            "data/tokens/owner_name": 5,
            "data/epochs/owner_name": 0.5,
            "data/padding": 0.125,
            "memory/rss_peak_gib": 0.25,
            "time/forward": 0.5,
            "time/save": 0.25,
            "time_max/forward": 0.75,
            "time_max/save": 0.25,
        }
    )


def test_tokens_in_the_loss_are_written_where_they_are_not_all(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.step(replace(step_metrics(1), sources={"chats": SourceProgress(tokens=5, epochs=0.5, loss_tokens=2)}))
    writer.close()
    assert read_curves(tmp_path).Scalars("data/loss_tokens/chats")[0].value == 2


def test_mfu_is_written_where_it_is_known(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.step(step_metrics(1, mfu=0.4))
    writer.close()
    assert read_curves(tmp_path).Scalars("perf/mfu")[0].value == pytest.approx(0.4)


def test_a_held_out_loss_writes_exactly_these_curves_and_has_a_page(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.heldout(HeldOutMetrics(step=3, loss=1.5, by_position={"0-4096": 2.0, "4096-8192": 1.0}, seconds=0.5))
    writer.close()
    curves = read_curves(tmp_path)
    values = {tag: curves.Scalars(tag)[0].value for tag in curves.Tags()["scalars"]}
    assert values == {
        "heldout/loss": 1.5,
        "heldout/seconds": 0.5,
        "heldout/loss/0-4096": 2,
        "heldout/loss/4096-8192": 1,
    }
    shown = pages(with_mfu=True, context_parallel=True, with_heldout=True)
    assert len(shown["Health"]) <= 12  # that TensorBoard shows without turning a page
    patterns = [pattern for page in ("Health", "Held-out loss") for _, tags in shown[page].values() for pattern in tags]
    for tag in values:
        assert sum(re.match(pattern, tag) is not None for pattern in patterns) == 1, tag
    assert "Held-out loss" not in pages(with_mfu=True, context_parallel=True)


def test_routing_is_a_density_and_a_histogram_per_layer(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    selected = torch.tensor([0, 3, 0, 1])  # three pairs selected one chunk, one selected three
    writer.routing(7, [LayerRouting(layer=1, density=0.75, selected=selected)])
    writer.close()
    curves = read_curves(tmp_path)
    assert curves.Scalars("routing/density/layer_1")[0].value == 0.75
    assert curves.Scalars("routing/mean_density")[0].value == 0.75
    (event,) = curves.Histograms("routing/selected_chunks/layer_1")
    histogram = event.histogram_value
    assert (event.step, histogram.num, histogram.sum, histogram.sum_squares) == (7, 4, 6, 12)
    assert (histogram.min, histogram.max) == (1, 3)
    inside = {limit: count for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True) if count}
    assert inside == {1.5: 3, 3.5: 1}


def exchange_statistics(**changes):
    values = {
        "planned_bytes": 1 << 30,
        "sent_bytes": 2 << 30,
        "slow_link_bytes": 1 << 29,
        "dense_bytes": 8 << 30,
        "coverage": {0: 0.25, 5: 0.5},
        "overlap": 0.75,
        "imbalance": {"zigzag": 1.25, "contiguous": 1.5},
        "exchanges": {"selective": 0.5, "allgather": 0.5, "ring": 0.0},
    }
    return ExchangeStatistics(**{**values, **changes})


def test_an_exchange_writes_exactly_these_curves(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.exchange(3, exchange_statistics())
    writer.close()
    curves = read_curves(tmp_path)
    events = {tag: curves.Scalars(tag)[0] for tag in curves.Tags()["scalars"]}
    assert {event.step for event in events.values()} == {3}
    assert {tag: event.value for tag, event in events.items()} == {
        "cp/planned_gib": 1.0,
        "cp/sent_gib": 2.0,
        "cp/slow_link_gib": 0.5,
        "cp/dense_gib": 8.0,
        "cp/coverage/layer_0": 0.25,
        "cp/coverage/layer_5": 0.5,
        "cp/overlap": 0.75,
        "cp/imbalance/zigzag": 1.25,
        "cp/imbalance/contiguous": 1.5,
        "cp/exchange/selective": 0.5,
        "cp/exchange/allgather": 0.5,
        "cp/exchange/ring": 0.0,
    }


def test_what_an_exchange_did_not_have_is_not_written(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.exchange(3, exchange_statistics(coverage={}, overlap=None, imbalance={"contiguous": 1.5}))
    writer.close()
    tags = read_curves(tmp_path).Tags()["scalars"]
    assert len(tags) == 8
    assert not any("coverage" in tag or "overlap" in tag or "zigzag" in tag for tag in tags)


def test_a_run_describes_itself_and_says_that_it_finished(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    settings = {"model": {"num_layers": 2, "head_dim": None}, "data": {"paths": ["a", "b"]}, "engine": "megatron"}
    shown = pages(with_mfu=True, context_parallel=False)
    writer.describe("model:\n  num_layers: 2\n", settings, shown)
    writer.finished()
    writer.close()
    curves = read_curves(tmp_path)
    assert curves.Tensors("config/text_summary")[0].tensor_proto.string_val == [b"    model:\n      num_layers: 2"]
    layout = layout_pb2.Layout.FromString(curves.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(shown)
    kinds = {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert set(curves.summary_metadata) >= kinds
    assert [path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []


def test_hyperparameters_are_flat_and_plain():
    nested = {"a": {"b": {"c": 1}, "d": None}, "e": True, "f": [1, 2], "g": 0.5, "h": "x"}
    assert hyperparameters(nested) == {"a.b.c": 1, "e": True, "f": "[1, 2]", "g": 0.5, "h": "x"}


@pytest.mark.parametrize("with_mfu", [False, True])
@pytest.mark.parametrize("context_parallel", [False, True])
def test_the_first_page_tells_whether_a_run_is_healthy(with_mfu, context_parallel):
    first, health = next(iter(pages(with_mfu=with_mfu, context_parallel=context_parallel).items()))
    assert first == "Health"
    assert len(health) <= 12  # that TensorBoard shows without turning a page
    patterns = [pattern for _, tags in health.values() for pattern in tags]
    wanted = ["train/loss", "train/grad_norm", "perf/tokens_per_second_per_gpu", "routing/mean_density", "memory/x_gib"]
    wanted += [f"fault/{kind}" for kind in EVENT_KINDS] + [f"time/{part}" for part in PARTS if part != "heat_map"]
    wanted += ["perf/mfu"] if with_mfu else ["perf/model_tflops_per_gpu"]
    wanted += ["cp/overlap", "cp/imbalance/zigzag"] if context_parallel else []
    for tag in wanted:
        assert sum(re.match(pattern, tag) is not None for pattern in patterns) == 1, tag
    assert not any(re.match(pattern, "cp/overlap") for pattern in patterns) or context_parallel


def test_heat_maps_are_pictures_with_a_blank_future(tmp_path):
    available = torch.ones(8, 8, dtype=torch.int64).tril() * 6
    selected = torch.eye(8, dtype=torch.int64) * 6
    selected[5, 2] = 3
    layer = SelectionMap(3, selected=selected, available=available)
    assert layer.share[5, 2] == 0.5
    assert layer.share.isnan().sum() == 28
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.heat_maps(4, [layer], sequence_length=8192)
    writer.close()
    (event,) = read_curves(tmp_path).Images("routing/heat_map/layer_3")
    assert event.step == 4
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    height, width = picture.shape[:2]
    assert (picture[height // 4, width // 2] == 255).all()  # later keys than the query
    assert (picture[height // 2, width // 4] < 255).any()  # earlier ones


@pytest.mark.parametrize(("start_step", "kept"), [(2, [(1, 11.0), (2, 12.0)]), (0, [])])
def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path, start_step, kept):
    """What the killed run logged beyond its checkpoint, if it got to any, gives way to what the resumed one logs."""
    first = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    for step in (1, 2, 3, 4):
        first.step(step_metrics(step, loss=10.0 + step))
    first.close()
    second = MetricsWriter(tmp_path / "tensorboard", start_step=start_step)
    second.step(step_metrics(start_step + 1, loss=0.5))
    second.close()
    events = read_curves(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [*kept, (start_step + 1, 0.5)]


def test_a_file_comes_after_those_begun_before_it(tmp_path):
    """By its name, even if they were begun in the same second, or on a node whose clock is ahead."""
    directory = tmp_path / "tensorboard"
    directory.mkdir()
    earlier = directory / f"events.out.tfevents.{int(time.time()) + 1:010d}.node.1.9"
    earlier.touch()
    for _ in range(2):
        MetricsWriter(directory, start_step=0).close()
    assert sorted(path.name for path in directory.iterdir())[0] == earlier.name
    assert len({path.name.split(".")[3] for path in directory.iterdir()}) == 3


def test_memory_of_this_process_is_plausible():
    if torch.cuda.is_available():
        kept = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        used = memory_used(torch.device("cuda"))
        assert used["reserved_peak_gib"] >= used["allocated_peak_gib"] >= kept.numel() / (1 << 30)
    else:
        (rss,) = memory_used(torch.device("cpu")).values()
        assert 0.05 < rss < 500  # GiB: torch alone takes more than 50 MiB


def test_a_cpu_has_no_peak():
    assert peak_bf16_flops(torch.device("cpu")) is None
