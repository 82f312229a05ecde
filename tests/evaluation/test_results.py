"""The file of results, the table, the picture, and options with several values."""

import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dash_dist import cli
from dash_dist.errors import ConfigError
from dash_dist.evaluation.groups import Group, Scored
from dash_dist.evaluation.options import Options
from dash_dist.evaluation.plot import plot
from dash_dist.evaluation.results import ResultFile
from dash_dist.evaluation.table import table_of

SETTINGS = {"seed": 0, "samples": 2}


def group(task="single", length=1024, scale=1.0, *, right=True):
    samples = (
        Scored(0, ("12",), (0.0,), " 12", (True,)),
        Scored(1, ("34",), (0.5,), " 34" if right else " 43", (right,)),
    )
    return Group(task, length, scale, 0.25 / (scale or 1.0), 1.5, 2, samples)


def test_groups_are_read_as_they_were_written(tmp_path):
    file = ResultFile(tmp_path / "new" / "results.json", SETTINGS, {"device": "cpu"})
    assert file.read() == []
    groups = [group(), group("multi_key", scale=None, right=False)]
    file.write(groups)
    assert file.read() == groups
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert (content["settings"], content["device"]) == (SETTINGS, "cpu")
    second = content["groups"][1]
    assert (second["accuracy"], second["count"], second["density"]) == (0.5, 2, 0.25)
    assert second["accuracy_by_depth"] == {"0-0.2": 1.0, "0.4-0.6": 0.0}
    assert [one["score"] for one in second["samples"]] == [1.0, 0.0]


def test_results_of_other_settings_are_not_touched(tmp_path):
    ResultFile(tmp_path / "results.json", SETTINGS, {}).write([group()])
    for changed, named in (({"seed": 1}, "seed = 0, and here it is 1"), ({"step": 3}, "step = None, and here it is 3")):
        with pytest.raises(ConfigError, match=f"has results with {named}: give another file with --output"):
            ResultFile(tmp_path / "results.json", SETTINGS | changed, {}).read()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2, "settings": {}, "groups": []}', '{"format": 1, "settings": {}, "groups": [3]}'],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"results.json holds no results of an evaluation.*: give another file"):
        ResultFile(tmp_path / "results.json", SETTINGS, {}).read()
    assert (tmp_path / "results.json").read_text() == text


def test_the_table_has_a_row_per_length_and_scale():
    groups = [group(task, length, scale) for length in (1024, 4096) for scale in (1.0, 2.0) for task in ("single", "x")]
    groups[-1] = group("x", 4096, 2.0, right=False)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table_of(groups))
    rows = [line.split() for line in captured.get().splitlines()]
    assert rows[0] == ["length", "scale", "density", "single", "x", "mean"]
    assert rows[1] == ["1,024", "1", "0.250", "1.00", "1.00", "1.00"]
    assert rows[4] == ["4,096", "2", "0.125", "1.00", "0.50", "0.75"]
    with console.capture() as captured:
        console.print(table_of([group(scale=None)]))
    assert captured.get().split()[:2] == ["length", "density"]


@pytest.mark.parametrize("scales", [(1.0, 2.0), (None,)])
def test_the_picture_is_written_in_the_format_of_its_name(tmp_path, scales):
    groups = [group("single", length, scale) for length in (1024, 1500) for scale in scales]
    plot(tmp_path / "picture.svg", groups)
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_options_take_several_values(monkeypatch, tmp_path):
    seen = []

    def evaluate(run, overrides, options, console):
        seen.append((overrides, options))

    monkeypatch.setitem(sys.modules, "dash_dist.evaluation.command", SimpleNamespace(evaluate=evaluate))
    arguments = "--length 16K 64K --routing-scale 1 2.5 --samples 3 a.b=1 --length 1M c.d=2 --suite all --seed 4"
    result = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path), *arguments.split()])
    assert result.exit_code == 0, result.output
    ((overrides, options),) = seen
    assert overrides == ["a.b=1", "c.d=2"]
    assert options.tokens == (16384, 65536, 1048576)
    assert options.routing_scales == (1.0, 2.5)
    assert (options.samples, options.suite, options.seed, options.step) == (3, "all", 4, None)
    assert CliRunner().invoke(cli.app, ["evaluate", str(tmp_path), "--routing-scale", "1", "x"]).exit_code == 2


@pytest.mark.parametrize("length", ["16X", "0", "-1", "1.5K", ""])
def test_a_length_that_is_no_number_of_tokens_is_refused(length):
    with pytest.raises(ConfigError, match=f"--length {length}: give tokens"):
        Options(lengths=(length,))


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"--plot .* needs matplotlib, .* 'dash-dist\[report\]'"):
        Options(plot=tmp_path / "x.png")
