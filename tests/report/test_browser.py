"""What a person sees of a run, in a real browser: TensorBoard's pages and the report, with every chart drawn."""

import asyncio
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dash_dist.report import write_report
from dash_dist.report.figures import figures
from dash_dist.report.record import read_run
from dash_dist.run.curve_names import HEALTH, pages
from dash_dist.run.events import EventLog
from tests.support.runs import read_curves, run_rank_processes, write_config
from tools.screenshots.browser import Page, chromium, find_chromium, open_page, tensorboard

WINDOW = 1400, 6000  # tall: TensorBoard draws what is inside the window
CARDS_OF_A_PAGE = 12  # of TensorBoard's time series
PATHS_OF_A_FRAME = 4  # that a figure of Matplotlib has before anything is drawn into it

# Where the tests are meant to run, a missing browser is a failure, and elsewhere a reason to skip.
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_chromium() is None and "CI" not in os.environ,
        reason="no chromium on the PATH: install it to run these tests",
    ),
    pytest.mark.timeout(1200),  # each wait has a limit of its own
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that has everything a run can show on a CPU."""
    folder = tmp_path_factory.mktemp("watched")
    changes = ["training.steps=8", "checkpoint.interval=4", "logging.heat_map_layers=null"]
    arguments = ["-m", "dash_dist.cli", "train", str(write_config(folder)), *changes]
    for status, output in run_rank_processes(arguments, 2, seconds=400):
        assert status == 0, output
    run = folder / "runs" / "tiny"
    EventLog(run).append("restart", "<started> again & again", step=4)
    return run


def look(at: Callable[[Page], Coroutine[Any, Any, None]]) -> None:
    async def visit(devtools: str) -> None:
        async with open_page(devtools) as page:
            await at(page)

    with chromium(*WINDOW) as devtools:
        asyncio.run(visit(devtools))


def test_tensorboard_shows_every_curve(run_folder: Path) -> None:
    curves = read_curves(run_folder)
    tags = curves.Tags()
    drawn = sorted([*tags["scalars"], *tags["histograms"], *tags["images"]])
    assert {tag.split("/")[0] for tag in drawn} >= {
        "train",
        "perf",
        "time",
        "time_max",
        "memory",
        "data",
        "routing",
        "cp",
    }
    assert [tag for tag in tags["images"] if tag.startswith("routing/heat_map/layer_")]

    async def custom_scalars(page: Page, address: str) -> None:
        expected = pages(with_mfu=False, context_parallel=True)
        charts = [(title, chart[1]) for content in expected.values() for title, chart in content.items()]
        await page.go(f"{address}/#custom_scalars")
        card = "all('tf-custom-scalar-multi-line-chart-card')"
        await page.wait_for(f"{card}.map(e => e.title)", [title for title, _ in charts])
        headings = "all('tf-category-paginated-view').map(e => e.shadowRoot.querySelector('.heading').innerText)"
        await page.wait_for(f"{headings}.map(text => text.split('\\n')[0])", list(expected))
        assert next(iter(expected)) == HEALTH
        for index, (title, patterns) in enumerate(charts):
            pattern_tags = {tag for tag in tags["scalars"] for pattern in patterns if matches(pattern, tag)}
            one = f"{card}[{index}].shadowRoot"
            names = f"[...{one}.querySelectorAll('.match-list-entry')].map(e => e.textContent.trim().split(/\\s+/)[1])"
            assert pattern_tags, title
            await page.wait_for(f"{names}.sort()", sorted(pattern_tags))
            chart = f"all('vz-line-chart2')[{index}]"
            await page.wait_for(
                f"[...{chart}.shadowRoot.querySelectorAll('path')].filter(e => e.getAttribute('d')).length >= "
                f"{len(pattern_tags)}"
            )
            await page.wait_for(f"(b => Math.min(b.width, b.height) > 100)({chart}.getBoundingClientRect())")

    async def time_series(page: Page, address: str) -> None:
        for start in range(0, len(drawn), CARDS_OF_A_PAGE):
            some = drawn[start : start + CARDS_OF_A_PAGE]
            query = urllib.parse.urlencode({"smoothing": 0, "tagFilter": f"^({'|'.join(some)})$"})
            await page.go("about:blank")  # another part of the same address alone would not load anything
            await page.go(f"{address}/?{query}#timeseries")
            cards = "all('card-view').filter(e => e.querySelector('svg path, canvas, img, svg rect'))"
            names = f"{cards}.map(e => e.querySelector('tb-truncated-path').innerText.replaceAll('\\n', ''))"
            await page.wait_for(f"{names}.filter(name => {json.dumps(some)}.includes(name)).length >= {len(some)}")
            boxes = f"{cards}.map(e => e.getBoundingClientRect())"
            await page.wait_for(f"{boxes}.every(b => Math.min(b.width, b.height) > 100)")

    with tensorboard(run_folder / "tensorboard") as address:

        async def both(page: Page) -> None:
            await custom_scalars(page, address)
            await time_series(page, address)

        look(both)
        shown = json.loads(get(f"{address}/data/plugin/text/text?run=.&tag=config%2Ftext_summary"))
        assert "sequence_length: 256" in shown[0]["text"]
        sessions = json.loads(get(f"{address}/data/plugin/hparams/session_groups", body=SESSIONS))["sessionGroups"]
        assert sessions[0]["hparams"]["training.sequence_length"] == 256
        metrics = {metric["name"]["tag"]: metric["value"] for metric in sessions[0]["metricValues"]}
        assert metrics["train/tokens"] == curves.Scalars("train/tokens")[-1].value
        assert sessions[0]["sessions"][0]["status"] == "STATUS_SUCCESS"


def test_the_report_is_whole_and_asks_for_nothing(run_folder: Path, tmp_path: Path) -> None:
    path = write_report(run_folder, tmp_path / "page.html")
    expected = figures(read_run(run_folder))
    names = {figure.name for figure in expected}
    assert names >= {"loss", "grad-norm", "speed", "time", "memory", "density", "selected-chunks", "bytes", "coverage"}
    assert names >= {"overlap", "imbalance", "learning-rate", "model-flops"}

    async def report(page: Page) -> None:
        await page.go(path.as_uri())
        await page.wait_for("document.readyState == 'complete'")
        found = await page.evaluate(
            "all('figure').map(e => { const b = e.getBoundingClientRect(), svg = e.querySelector('svg'),"
            " image = e.querySelector('img'); return [e.id, e.querySelector('figcaption strong').innerText, b.width,"
            " b.height, svg ? svg.querySelectorAll('path, use').length : image.naturalWidth,"
            " (svg ? svg.ariaLabel : image.alt).length]; })"
        )
        assert [name for name, *_ in found if not name.startswith("heat-map")] == [figure.name for figure in expected]
        assert [name for name, *_ in found if name.startswith("heat-map")] == ["heat-map-0", "heat-map-1"]
        for name, title, width, height, content, description in found:
            assert title, name
            assert min(width, height) > 100, name
            assert content > PATHS_OF_A_FRAME, name
            assert description > 20, name
        assert await page.evaluate("document.querySelector('h1').innerText") == "Run tiny: finished"
        assert "<started> again & again" in await page.evaluate("document.body.innerText")
        assert await page.evaluate("document.scripts.length") == 0
        assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        doubled = "all('[id]').map(e => e.id).filter((id, i, ids) => ids.indexOf(id) != i)"
        assert await page.evaluate(doubled) == []
        outside = [url for url in page.requests if url != path.as_uri() and not url.startswith("data:")]
        assert page.requests[0] == path.as_uri()
        assert outside == []

    look(report)


SESSIONS = {
    "experimentName": "",
    "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"],
    "colParams": [],
    "startIndex": 0,
    "sliceSize": 10,
}


def get(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def matches(pattern: str, tag: str) -> bool:
    return re.match(pattern, tag) is not None
