"""Headless Chromium, driven over its DevTools protocol: open a page, look, click, take pictures.

As a program it takes the pictures of docs/images:
``python tests/browser.py REPORT.html PICTURE.png [--width 1280] [--dark] [--selector CSS]``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT = 120.0  # seconds for which a busy machine may take to start it


def find_chromium() -> str | None:
    """The browser's program, or None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page.

    Attributes:
        complaints: console errors, exceptions and failed requests of the page so far.
    """

    def __init__(self) -> None:
        program = find_chromium()
        assert program is not None
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.complaints: list[str] = []
        self.numbers = itertools.count(1)
        self.loop = asyncio.new_event_loop()
        words = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0",
            f"--user-data-dir={self.profile.name}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.loop.run_until_complete(self._connect())

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self._leave())
        self.loop.close()
        self.process.terminate()
        self.process.wait(timeout=30)
        self.profile.cleanup()

    async def _connect(self) -> None:
        note = Path(self.profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + WAIT
        while not (note.is_file() and "\n" in note.read_text()):
            assert self.process.poll() is None, "the browser did not start"
            assert time.monotonic() < deadline, "the browser takes too long to start"
            await asyncio.sleep(0.1)
        address = f"http://127.0.0.1:{note.read_text().split()[0]}"
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"{address}/json/list") as answer:
            pages = await answer.json()
        socket = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        self.socket = await self.session.ws_connect(socket, max_msg_size=0)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")

    async def _leave(self) -> None:
        await self.socket.close()
        await self.session.close()

    async def _call(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def _receive(self) -> dict[str, Any]:
        message = json.loads((await self.socket.receive(timeout=WAIT)).data)
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif kind == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif kind == "Network.loadingFailed":
            self.complaints.append(params["errorText"])
        elif kind == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("data:", "file:", "about:")):
                self.complaints.append(f"asked the network for {url}")
        return message

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol, and its result."""
        return self.loop.run_until_complete(self._call(method, **params))

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        """Show a file in a window of that width and wait until all of it is there."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.run("new Promise(r => document.readyState === 'complete' ? r() : (onload = r))")

    def run(self, script: str) -> Any:
        """The value of an expression on the page; promises are waited for."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self, path: Path, selector: str = "html", most: int = 20_000) -> None:
        """A PNG of the first such element, however tall (up to ``most`` pixels)."""
        box = self.run(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect();"
            "return [b.x + scrollX, b.y + scrollY, b.width, b.height] })()"
        )
        x, y, width, height = box
        clip = {"x": x, "y": y, "width": width, "height": min(height, most), "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    """Take one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--selector", default="html", help="take this element alone")
    parser.add_argument("--most", type=int, default=20_000, help="pixels of height")
    options = parser.parse_args()
    with Browser() as browser:
        browser.open(options.page, options.width, options.dark)
        browser.picture(options.picture, options.selector, options.most)


if __name__ == "__main__":
    main()
