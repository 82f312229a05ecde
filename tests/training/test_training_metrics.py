import pytest
import torch
from training_runs import read_curves

from dash_dist.megatron import ExchangeStatistics, LayerRouting
from dash_dist.training.metrics import MetricsWriter, StepMetrics, memory_used, peak_bf16_flops


def step_metrics(step, *, loss=1.0, mfu=None):
    return StepMetrics(
        step=step,
        loss=loss,
        grad_norm=0.5,
        learning_rate=1e-3,
        tokens=100 * step,
        step_seconds=2.0,
        tokens_per_second_per_gpu=25.0,
        mfu=mfu,
        skipped_documents=3,
        padding=0.125,
        memory={"rss_peak_gib": 0.25},
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
            "data/skipped_documents": 3,
            "data/padding": 0.125,
            "memory/rss_peak_gib": 0.25,
        }
    )


def test_mfu_is_written_where_it_is_known(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    writer.step(step_metrics(1, mfu=0.4))
    writer.close()
    assert read_curves(tmp_path).Scalars("perf/mfu")[0].value == pytest.approx(0.4)


def test_routing_is_a_density_and_a_histogram_per_layer(tmp_path):
    writer = MetricsWriter(tmp_path / "tensorboard", start_step=0)
    selected = torch.tensor([0, 3, 0, 1])  # three pairs selected one chunk, one selected three
    writer.routing(7, [LayerRouting(layer=1, density=0.75, selected=selected)])
    writer.close()
    curves = read_curves(tmp_path)
    assert curves.Scalars("routing/density/layer_1")[0].value == 0.75
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
