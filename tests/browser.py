"""A headless browser driven over DevTools' pipe, with only the standard library: pages, keys, screenshots."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser; chromium, chromium-browser and google-chrome are not on PATH"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# For what must happen: costs nothing where it does, and a loaded machine may need it. Less than a test's own timeout.
PATIENCE_S = 180.0
# Keys that the browser itself handles, such as Escape in a dialog, are identified by number.
VIRTUAL_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27}


class BrowserError(AssertionError):
    """The browser refuses a command, such as a question to a page that it is replacing."""


class Tab:
    """One page. Messages are JSON ended by a zero byte, on file descriptors 3 and 4 of the browser."""

    def __init__(self, to_browser: Any, from_browser: Any):
        self._to, self._from = to_browser, from_browser
        self._id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise BrowserError(answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> bytes:
        message = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser is gone"
            message += byte
        return bytes(message)

    def reload(self) -> None:
        """Returns when the new page is complete; until then questions would be answered by the old one or by none."""
        self.run("window.isOld = true")
        self.call("Page.reload")
        self.until("!window.isOld && document.readyState === 'complete'")

    def open(self, url: str, width: int = 1200, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, promises awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(result["exceptionDetails"])
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until a question, which may be asked repeatedly, is answered with something true."""
        self.wait_for(expression, bool)

    def equals(self, expression: str, value: Any) -> None:
        """Waits until a question is answered with `value`: keys and events take effect after they were sent."""
        self.wait_for(expression, lambda answer: answer == value)

    def wait_for(self, expression: str, accepted: Callable[[Any], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        answer: Any = None
        while True:
            with suppress(BrowserError):  # the page is being replaced
                answer = self.run(expression)
                if accepted(answer):
                    return
            assert time.monotonic() < deadline, f"never as expected: {expression}; last: {answer!r}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            more: dict[str, Any] = {"windowsVirtualKeyCode": VIRTUAL_KEYS[key]} if key in VIRTUAL_KEYS else {}
            if len(key) == 1 and kind == "keyDown":
                more["text"] = key
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Errors thrown by the page or logged by the browser, including blocked scripts."""
        self.run("0")  # pending events have been received
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found


@contextmanager
def browser_tab() -> Iterator[Tab]:
    assert BROWSER is not None
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    # The browser reads descriptor 3 and writes 4, regardless of the descriptors here.
    script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["bash", "-c", script, "bash", str(their_in), str(their_out)]
        process = subprocess.Popen(
            [*command, BROWSER, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        with open(our_out, "wb") as to_browser, open(our_in, "rb") as from_browser:
            try:
                yield Tab(to_browser, from_browser)
            finally:
                process.kill()
                process.wait()
