"""A headless Chromium and a TensorBoard on this machine, for pictures of pages and for tests that look at them.

Knows how they are started, ended and asked; does not know what is on a page. Both listen on 127.0.0.1 only. Needs a
`chromium` on the PATH (Debian: apt-get install chromium).
"""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_SECONDS = 240  # far more than any page takes: a busy machine must not look like a broken page
_OPTIONS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars remote-debugging-port=0"
)
# Also in the shadow trees of custom elements, which TensorBoard's dashboards are made of.
_DEEP = """
function* deep(root) {
  for (const element of root.querySelectorAll('*')) {
    yield element;
    if (element.shadowRoot) yield* deep(element.shadowRoot);
  }
}
const all = selector => [...deep(document)].filter(element => element.matches(selector));
"""


class BrowserError(Exception):
    """No browser, or a page that did not come to what was waited for."""


def find_chromium() -> str | None:
    """Its path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One open tab. `requests` holds the address of everything it has asked for."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.requests: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of Chromium's DevTools protocol. Raises BrowserError."""
        number = next(self._numbers)
        await self._connection.send_json({"id": number, "method": method, "params": parameters})
        while (answer := await self._connection.receive_json()).get("id") != number:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, in which `all(selector)` finds elements in shadow trees too."""
        # A function's body of its own, so that names can be declared again in the next call.
        source = f"(() => {{ {_DEEP} return ({expression}); }})()"
        answer = await self.call("Runtime.evaluate", expression=source, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def wait_for(self, expression: str, expected: Any = True, *, seconds: float = WAIT_SECONDS) -> None:
        """Return when the value of a JavaScript expression is `expected`. Raises BrowserError if it is not in time.

        An expression that cannot be evaluated, of elements that are not there yet for example, has no value yet.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                value = await self.evaluate(expression)
            except BrowserError as error:
                value = error
            if value == expected:
                return
            if time.monotonic() > deadline:
                raise BrowserError(f"not {expected!r} within {seconds} s but {value!r}: {expression}")
            await asyncio.sleep(0.3)

    async def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])


@contextlib.asynccontextmanager
async def open_page(devtools: str, *, before: str = "") -> AsyncIterator[Page]:
    """A new tab of the `chromium` at `devtools`. `before` is JavaScript that runs at the beginning of every page."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{devtools}/json/new?about:blank") as response:
            tab = (await response.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(tab, max_msg_size=0) as connection:
            page = Page(connection)
            for domain in ("Page", "Network", "Runtime"):
                await page.call(f"{domain}.enable")
            await page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
            yield page


@contextlib.contextmanager
def chromium(width: int, height: int) -> Iterator[str]:
    """A headless Chromium with a profile of its own; the address of its DevTools. Raises BrowserError."""
    path = find_chromium()
    if path is None:
        raise BrowserError(f"no {', '.join(NAMES)} on the PATH: install one of them")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [f"--{option}" for option in _OPTIONS.split()]
        process = subprocess.Popen(
            [path, *options, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if match := re.search(r"DevTools listening on ws://([^/]+)/", line):
                    break
            else:
                raise BrowserError(f"{path} ended without starting its DevTools")
            yield f"http://{match[1]}"
        finally:
            _end(process)


@contextlib.contextmanager
def tensorboard(log_directory: Path) -> Iterator[str]:
    """TensorBoard on a free loopback port, answering; its address. Raises BrowserError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={log_directory}", "--host=127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, f"--port={port}"], stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            while not _lists_a_run(address):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise BrowserError(f"TensorBoard did not start:\n{log.read().decode(errors='replace')}")
                time.sleep(0.5)
            yield address
        finally:
            _end(server)


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _lists_a_run(address: str) -> bool:
    """Return whether the server has read the run's files."""
    try:
        with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as response:
            return bool(json.load(response))
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
