"""Photographs a run's TensorBoard in headless Chromium: the picture in the README.

    python tools/screenshot_tensorboard.py runs/demo/tensorboard docs/images/tensorboard.png

Needs `tensorboard` and a `chromium` on the PATH (Debian: apt-get install chromium). Listens on 127.0.0.1 only.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

START_SECONDS = 60
RENDER_MILLISECONDS = 30_000


def main(
    log_directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The run's tensorboard folder.")],
    picture: Annotated[Path, typer.Argument(help="The PNG to write.")],
    width: int = 1600,
    height: int = 1400,
    fragment: Annotated[str, typer.Option(help="The dashboard: timeseries, scalars or distributions.")] = "timeseries",
) -> None:
    """Write a PNG of the dashboard."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise typer.BadParameter("no chromium, chromium-browser or google-chrome on the PATH: install one of them")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tensorboard(log_directory) as address, tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--virtual-time-budget={RENDER_MILLISECONDS}",
                f"--screenshot={picture.absolute()}",
                f"{address}/#{fragment}",
            ],
            check=True,
            timeout=180,
            stderr=subprocess.DEVNULL,
        )
    print(f"{picture}: {picture.stat().st_size} bytes")


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
