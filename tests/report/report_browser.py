"""A headless Chromium, driven over two pipes with the DevTools protocol: no driver to install, no port to open.

`python tests/report/report_browser.py PAGE FOLDER` writes screenshots of a page at three widths, light and dark.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
)  # fmt: skip
WIDTHS = (375, 768, 1440)
SCHEMES = ("light", "dark")
LONGEST_WAIT_S = 120


def installed_browser() -> str | None:
    """Path of a Chromium or Chrome: `SHOTLESS_BROWSER`, else the first on the PATH."""
    return next((found for name in (os.environ.get("SHOTLESS_BROWSER", ""), *NAMES) if name and (found := shutil.which(name))), None)


class Page:
    """One tab. `requests` and `complaints` collect what it asks of the network and what lands on its console."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._buffer, self._last, self._session = b"", 0, None
        self._loaded = False
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its result."""
        self._last += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._writer, json.dumps({"id": self._last, "method": method, "params": params, **session}).encode() + b"\0")
        while (message := self._receive()).get("id") != self._last:
            self._note(message)
        assert "error" not in message, message
        return message["result"]

    def look_at(self, path: Path, width: int, scheme: str = "light", media: str = "screen") -> None:
        """Load a file at a width in CSS pixels, and wait until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._note(self._receive())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page; the page's own policy does not hold for it."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press_tab(self) -> None:
        """The Tab key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def screenshot(self, file: Path) -> None:
        """The whole page, from top to bottom, as PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def pdf(self) -> bytes:
        """The page as printed."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reader], [], [], LONGEST_WAIT_S)
            assert ready, f"the browser has said nothing for {LONGEST_WAIT_S} s"
            part = os.read(self._reader, 1 << 20)
            assert part, "the browser is gone"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.complaints.append(params["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"{params['type']}: {params['args']}")


@contextmanager
def open_page(browser: str) -> Iterator[Page]:
    """A tab of a browser of its own, with a profile that is thrown away."""
    (read_in, write_in), (read_out, write_out) = (tuple(map(_high, os.pipe())) for _ in range(2))
    with tempfile.TemporaryDirectory(prefix="shotless-browser-", ignore_cleanup_errors=True) as profile:
        # The protocol's descriptors are 3 and 4; a shell can put them there without a fork in this process, which may have threads.
        command = ["bash", "-c", f'exec "$@" 3<&{read_in} 4>&{write_out}', "browser", browser, *FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command, pass_fds=(read_in, write_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (read_in, write_out):
            os.close(end)
        try:
            yield Page(read_out, write_in)
        finally:
            # A browser whose pipes close ends by itself.
            os.close(write_in)
            os.close(read_out)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def shoot(page: Page, path: Path, folder: Path) -> list[Path]:
    """Screenshots of a page at each width, light and dark: FOLDER/WIDTH-SCHEME.png."""
    files = []
    for width in WIDTHS:
        for scheme in SCHEMES:
            page.look_at(path, width, scheme)
            files.append(folder / f"{width}-{scheme}.png")
            page.screenshot(files[-1])
    return files


def _high(descriptor: int) -> int:
    """A descriptor out of the way of 3 and 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


if __name__ == "__main__":
    found = installed_browser()
    if found is None:
        sys.exit("no Chromium or Chrome on the PATH; SHOTLESS_BROWSER can name one")
    with open_page(found) as tab:
        for file in shoot(tab, Path(sys.argv[1]), Path(sys.argv[2])):
            print(file)
