"""Takes the documentation's screenshots of a run in headless Chromium.

    python -m tools.screenshots runs/demo docs/images

writes tensorboard.png (the first page of custom scalars), report.png (the upper part of `dash-dist report`) and
heat_map.png (the last map of the last layer that is drawn). Needs a `chromium` on the PATH (Debian: apt-get install
chromium).
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from dash_dist.report import write_report
from dash_dist.report.record import numbered, read_run
from tools.screenshots.browser import Page, chromium, open_page, tensorboard

TENSORBOARD_WINDOW = 1500, 1460  # three charts side by side
REPORT_WINDOW = 1400, 1700
SETTLE_SECONDS = 6  # charts grow into their place
# In place of what a visitor would click: every point inside its chart, as it was measured.
UNSMOOTHED = "localStorage.setItem('_tb_global_settings', " + json.dumps(json.dumps({"ignoreOutliers": False})) + ")"
TAKE_ALL = "all('tf-custom-scalar-dashboard').forEach(e => { e._smoothingWeight = 0; e._ignoreYOutliers = false; })"


def main(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of the run.")],
    pictures: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
) -> None:
    """Write the pictures of a run."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tensorboard(run / "tensorboard") as address:
        _screenshot(pictures / "tensorboard.png", TENSORBOARD_WINDOW, lambda page: _first_page(page, address))
    report = write_report(run)
    _screenshot(pictures / "report.png", REPORT_WINDOW, lambda page: page.go(report.resolve().as_uri()))
    maps = {tag: map_ for tag, map_ in read_run(run).pictures.items() if tag.startswith("routing/heat_map/")}
    if maps:
        (pictures / "heat_map.png").write_bytes(maps[max(maps, key=numbered)].png)


async def _first_page(page: Page, address: str) -> None:
    await page.go(f"{address}/#custom_scalars")
    await page.wait_for("all('tf-custom-scalar-multi-line-chart-card').length > 0")
    await page.evaluate(TAKE_ALL)


def _screenshot(picture: Path, window: tuple[int, int], visit: Callable[[Page], Coroutine[Any, Any, None]]) -> None:
    async def look(devtools: str) -> bytes:
        async with open_page(devtools, before=UNSMOOTHED) as page:
            await visit(page)
            await asyncio.sleep(SETTLE_SECONDS)
            return await page.screenshot()

    with chromium(*window) as devtools:
        picture.write_bytes(asyncio.run(look(devtools)))
    print(f"{picture}: {picture.stat().st_size} bytes")


if __name__ == "__main__":
    typer.run(main)
