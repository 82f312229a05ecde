"""Photographs a run's TensorBoard in headless Chromium: the picture in the README.

    python tools/screenshot_tensorboard.py runs/demo/tensorboard docs/images/tensorboard.png
    python tools/screenshot_tensorboard.py runs/demo/tensorboard perf.png --tags 'perf|memory'

Needs a `chromium` on the PATH (Debian: apt-get install chromium). TensorBoard and the browser listen on 127.0.0.1 only.
"""

import asyncio
import base64
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

START_SECONDS = 60
RENDER_SECONDS = 12  # charts are drawn one after another, in real time
DEFAULT_TAGS = "train/(loss|learning_rate)|routing"
# TensorBoard keeps what its settings pane says in the browser: no pane, and every point inside the chart.
SETTINGS = {"ignoreOutliers": False, "timeSeriesSettingsPaneOpened": False}


def main(
    log_directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The run's tensorboard folder.")],
    picture: Annotated[Path, typer.Argument(help="The PNG to write.")],
    tags: Annotated[str, typer.Option(help="Which charts: a regular expression of their names.")] = DEFAULT_TAGS,
    width: int = 1400,
    height: int = 1230,
) -> None:
    """Write a PNG of the charts."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tensorboard(log_directory) as address, browser(width, height) as devtools:
        page = f"{address}/?{urllib.parse.urlencode({'tagFilter': tags, 'smoothing': 0})}#timeseries"
        picture.write_bytes(asyncio.run(photograph(devtools, page)))
    print(f"{picture}: {picture.stat().st_size} bytes")


async def photograph(devtools: str, page: str) -> bytes:
    """A PNG of a page, by Chromium's DevTools protocol."""
    script = f"localStorage.setItem('_tb_global_settings', {json.dumps(json.dumps(SETTINGS))})"
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{devtools}/json/new?about:blank") as response:
            tab = (await response.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(tab, max_msg_size=0) as connection:
            calls = iter(range(1, 100))

            async def call(method: str, **parameters: Any) -> dict[str, Any]:
                number = next(calls)
                await connection.send_json({"id": number, "method": method, "params": parameters})
                while (answer := await connection.receive_json()).get("id") != number:
                    pass  # events of the page
                return answer["result"]

            await call("Page.enable")
            await call("Page.addScriptToEvaluateOnNewDocument", source=script)
            await call("Page.navigate", url=page)
            await asyncio.sleep(RENDER_SECONDS)
            return base64.b64decode((await call("Page.captureScreenshot", format="png"))["data"])


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[str]:
    """A headless Chromium of its own; the address of its DevTools."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        raise typer.BadParameter("no chromium, chromium-browser or google-chrome on the PATH: install one of them")
    options = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars remote-debugging-port=0"
    )
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [
                found[0],
                *(f"--{option}" for option in options.split()),
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if match := re.search(r"DevTools listening on ws://([^/]+)/", line):
                    yield f"http://{match[1]}"
                    break
            else:
                raise RuntimeError(f"{found[0]} ended without starting its DevTools")
        finally:
            process.terminate()
            process.communicate(timeout=20)


@contextlib.contextmanager
def tensorboard(log_directory: Path) -> Iterator[str]:
    """TensorBoard on a free loopback port, answering; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={log_directory}", "--host=127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, f"--port={port}"], stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"{address}/data/runs"):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"TensorBoard did not start:\n{log.read().decode(errors='replace')}")
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=20)


def _answers(url: str) -> bool:
    """Whether the server has read the run's files: it lists at least one run."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read().strip() not in (b"", b"[]")
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


if __name__ == "__main__":
    typer.run(main)
