"""Pages: a headless Chromium, spoken to over a pipe by its DevTools protocol, and the elements of a page."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
    ),
    "--remote-debugging-pipe",
)
ON_THREE_AND_FOUR = (
    "import os, sys; [os.dup2(int(word), 90 + n) for n, word in enumerate(sys.argv[1:3])]; "
    "os.dup2(90, 3); os.dup2(91, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""Starts a program that speaks the protocol on these two descriptors."""

LIMIT_S = 300
"""A browser that hangs is ended, which ends the test that waits for it."""


def find_chromium() -> str:
    """Return the path of Chromium; without one the test is skipped, or fails where it is required."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found:
        return found
    if os.environ.get("FEDDDP_REQUIRE_CHROMIUM") == "1":
        pytest.fail("FEDDDP_REQUIRE_CHROMIUM=1, but there is no chromium; install the package chromium")
    pytest.skip("there is no chromium; install the package chromium")


class Browser:
    """One page of a browser. What it logs, throws and requests is kept."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        commands, self._commands = os.pipe()
        answers_from, answers = os.pipe()
        command = [find_chromium(), *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", ON_THREE_AND_FOUR, str(commands), str(answers), *command],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._answers = os.fdopen(answers_from, "rb")
        self._timer = threading.Timer(LIMIT_S, self._process.kill)
        self._timer.daemon = True
        self._timer.start()
        self._sent, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and remove its folder."""
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        self._answers.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _receive(self) -> dict[str, Any]:
        line = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            line += byte
        message: dict[str, Any] = json.loads(line)
        return message

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._sent += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._sent, "method": method, "params": parameters, **session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, *, width: int = 1200, theme: str = "light", state: str = "") -> None:
        """Open a file in a window of that width, in a "light" or "dark" theme, with `state` after the #."""
        phone = width < 500
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        for url in ("about:blank", f"{path.resolve().as_uri()}#{state}"):
            self.events.clear()
            self.call("Page.navigate", url=url)
            while not any(event["method"] == "Page.loadEventFired" for event in self.events):
                self.events.append(self._receive())
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def problems(self) -> list[str]:
        """Return what the page logged as an error or a warning, threw, or requested beside itself."""
        found = []
        for event in self.events:
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(f"threw: {parameters['exceptionDetails']['text']}")
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
                found.append(f"console: {parameters['args']}")
            elif event["method"] == "Log.entryAdded":
                found.append(f"log: {parameters['entry']['text']}")
            elif event["method"] == "Network.requestWillBeSent" and parameters["type"] != "Document":
                url = parameters["request"]["url"]
                found += [] if url.startswith("data:") else [f"request: {url}"]
        return found

    def overflow(self) -> int:
        """Return how many pixels the page is wider than its window."""
        return int(self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def mouse(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self) -> bytes:
        """Return a picture of the window, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


class Tags(HTMLParser):
    """Collects the elements of an HTML page, and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.wanted: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attributes]
        assert not any(name.startswith("on") for name in names)
        self.wanted += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
