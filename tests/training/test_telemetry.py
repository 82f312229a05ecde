"""Which steps are measured, and how the seconds of ranks become the curves'."""

import sys

import pytest

from dash_dist.config.file import load_config
from dash_dist.errors import ConfigError
from dash_dist.training.telemetry.recorder import Telemetry, heat_map_layers, over_ranks
from tests.support.runs import read_curves, run_command, write_config
from tests.training import slow_device


class Engine:
    record_seconds = False
    record_selections = ()

    def seconds_by_part(self):
        return {"forward": 0.5, "backward": 1.0}

    def selection_maps(self):
        return list(self.record_selections)


class Curves:
    def __init__(self):
        self.written = {}

    def write(self, step, write):
        write(self)

    def heat_maps(self, step, maps, *, sequence_length):
        self.written[step] = maps


def test_maps_are_taken_at_the_ends_and_every_interval():
    config = load_config("configs/demo.yaml", ["logging.heat_map_interval=20", "logging.heat_map_layers=[1]"])
    engine, curves = Engine(), Curves()
    telemetry = Telemetry(config, engine, curves)
    for step in range(1, config.training.steps + 1):
        telemetry.before_step(step, logged=step % 2 == 0)
        assert engine.record_seconds == (step % 2 == 0)
        telemetry.log_heat_maps(step)
        assert not engine.record_selections  # the next step starts without
    assert curves.written == {1: [1], 20: [1], 40: [1], 50: [1]}


def test_the_hosts_seconds_are_means_over_the_steps_since_the_last_logged_one(monkeypatch):
    now = iter(range(0, 100, 4))  # every measurement takes four seconds
    monkeypatch.setattr("dash_dist.training.telemetry.recorder.time.perf_counter", lambda: float(next(now)))
    telemetry = Telemetry(load_config("configs/demo.yaml", []), Engine(), None)
    for step in (1, 2):
        with telemetry.measure("data"):
            pass
        telemetry.before_step(step, logged=step == 2)
    with telemetry.measure("save"):
        pass
    assert telemetry.own_seconds() == {"data": 4.0, "save": 2.0, "forward": 0.5, "backward": 1.0}
    telemetry.before_step(3, logged=True)
    assert telemetry.own_seconds() == {"data": 0.0, "save": 0.0, "forward": 0.5, "backward": 1.0}


def test_ranks_become_a_mean_that_adds_up_and_a_slowest():
    ranks = [{"data": 0.0, "save": 2.0, "forward": 1.0}, {"data": 1.0, "save": 0.0, "forward": 2.0, "exchange": 1.0}]
    mean, slowest = over_ranks(ranks, 4.5)
    assert mean == {"data": 0.5, "save": 1.0, "forward": 1.5, "exchange": 0.5, "rest": 2.0}
    assert slowest == {"data": 1.0, "save": 2.0, "forward": 2.0, "exchange": 1.0, "rest": 3.5}
    assert sum(mean.values()) - mean["save"] == 4.5


@pytest.mark.parametrize(
    ("chosen", "kinds", "drawn"),
    [
        (None, ["dash"], [0]),
        (None, ["dash"] * 2, [0, 1]),
        (None, ["dash"] * 32, [0, 16, 31]),
        (None, ["window", "window", "dash"] * 4, [2, 8, 11]),
        (None, ["dense"] * 4, []),
        ([3, 1], ["dash"] * 4, [3, 1]),
    ],
)
def test_the_first_middle_and_last_layer_are_drawn_unless_others_are_chosen(chosen, kinds, drawn):
    assert heat_map_layers(chosen, kinds) == drawn


@pytest.mark.parametrize(
    ("layers", "message"),
    [("[2]", "give layers from 0 to 1"), ("[1, 1]", "names a layer twice"), ("[1, 0]", "names 0, a window layer")],
)
def test_layers_that_cannot_be_drawn_are_refused(layers, message):
    kinds = ["attention.kind=[window, dash]", "attention.window=128"]
    with pytest.raises(ConfigError, match=message):
        load_config("configs/demo.yaml", [f"logging.heat_map_layers={layers}", *kinds])


def test_a_step_ends_when_its_device_has_updated_the_weights(tmp_path):
    """A logged step has its own update, and not that of the step before it; other steps do not wait."""
    changes = ["parallel.context=1", "training.steps=9", "logging.interval=4"]
    done = run_command([sys.executable, slow_device.__file__, str(write_config(tmp_path)), *changes], {})
    assert "waits: 6" in done.stdout, done.stdout  # after the steps 1, 3, 4, 7, 8 and 9
    seconds = {one.step: one.value for one in read_curves(tmp_path / "runs" / "tiny").Scalars("perf/step_seconds")}
    for step in (4, 8):
        assert seconds[step] == pytest.approx(slow_device.SECONDS)
