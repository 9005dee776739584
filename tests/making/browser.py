"""Headless Chromium for tests, driven through chromedriver (W3C WebDriver) with nothing but the
standard library.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-device-scale-factor=1",
]  # fmt: skip


class Browser:
    """One window of a browser."""

    def __init__(self, port: int, session: str) -> None:
        self._session = f"http://127.0.0.1:{port}/session/{session}"

    def _call(self, method: str, path: str, **body: Any) -> Any:
        return call(method, self._session + path, body if method == "POST" else None)

    def open(self, url: str, state: str | None = "ready", timeout_s: float = 90) -> None:
        """Load a page and wait until it says that it is in `state`; pages of others say None."""
        self._call("POST", "/url", url=url)
        self.wait("document.documentElement.dataset.state !== 'loading'", timeout_s)
        assert self.run("return document.documentElement.dataset.state") == state, self.messages()

    def wait(self, condition: str, timeout_s: float = 30) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + timeout_s
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} did not become true; {self.messages()}"
            time.sleep(0.1)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script gives back."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def run_async(self, script: str, *arguments: Any) -> Any:
        """What a script hands to its last argument."""
        return self._call("POST", "/execute/async", script=script, args=list(arguments))

    def press(self, key: str) -> None:
        """Press and release a key in what has the focus."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._call("POST", "/goog/cdp/execute", cmd=name, params=parameters)

    def prefer(self, scheme: str) -> None:
        """Have the page believe that a 'dark' or 'light' scheme is wanted."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def be_a_phone(self, width: int = 390, height: int = 844) -> None:
        """Show pages as on a phone with fingers; nothing but `be_a_desktop` ends it."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=True,
        )
        self.command("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=5)

    def be_a_desktop(self) -> None:
        """End `be_a_phone`."""
        self.command("Emulation.clearDeviceMetricsOverride")
        self.command("Emulation.setTouchEmulationEnabled", enabled=False)

    def touch(self, *places: list[tuple[float, float]], at_s: float | None = None) -> None:
        """Put fingers down, move them from place to place, each a list of (x, y), and lift them.

        at_s: the time that the page is told, in seconds.
        """
        told = {} if at_s is None else {"timestamp": at_s}
        for n, fingers in enumerate(places):
            points = [{"x": x, "y": y, "id": k} for k, (x, y) in enumerate(fingers)]
            kind = "touchMove" if n else "touchStart"
            self.command("Input.dispatchTouchEvent", type=kind, touchPoints=points, **told)
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[], **told)

    def resize(self, width: int, height: int) -> None:
        """Make the window so large that the page has this size in CSS pixels."""
        self._call("POST", "/window/rect", width=width, height=height)
        inner = self.run("return [innerWidth, innerHeight]")
        self._call("POST", "/window/rect", width=2 * width - inner[0], height=2 * height - inner[1])

    def device(self, width: int, height: int, *, scheme: str = "light") -> None:
        """Show the page as a device of this size in CSS pixels does, in a colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        for command, params in (
            ("setDeviceMetricsOverride", metrics),
            ("setEmulatedMedia", {"features": features}),
        ):
            name = f"Emulation.{command}"
            self._call("POST", "/goog/cdp/execute", cmd=name, params=params)

    def png(self) -> bytes:
        """A picture of the window, once two frames have been drawn."""
        self.run_async(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() =>"
            " done()))"
        )
        return base64.b64decode(self._call("GET", "/screenshot"))

    def picture(self) -> np.ndarray:
        """(rows, columns, 3) of the window."""
        from PIL import Image  # comes with matplotlib

        return np.asarray(Image.open(BytesIO(self.png())).convert("RGB"))

    def box(self, selector: str) -> tuple[slice, slice]:
        """Rows and columns of the window that an element covers."""
        script = "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        left, top, right, bottom = self.run(
            script + "return [b.left, b.top, b.right, b.bottom]", selector
        )
        return slice(round(top), round(bottom)), slice(round(left), round(right))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What has been logged since the last call: 'browser' or 'performance'."""
        return self._call("POST", "/se/log", type=kind)

    def messages(self) -> list[str]:
        """Errors and warnings that the page or the browser reported since the last call."""
        return [
            entry["message"]
            for entry in self.log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def requested(self) -> list[str]:
        """Addresses that were asked for since the last call, those of the voxels inside the page
        (data:, blob:) too.
        """
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [
            e["params"]["request"]["url"]
            for e in events
            if e["method"] == "Network.requestWillBeSent"
        ]


def call(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=180) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None


@contextmanager
def chromium(folder: Path, width: int = 820, height: int = 560) -> Iterator[Browser]:
    """A browser with a fresh profile in `folder`; skips the test where there is none."""
    binary = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip(
            "Chromium and chromedriver are not installed (Debian: apt-get install chromium"
            " chromium-driver)"
        )
    command = [driver, "--port=0", "--allowed-ips=127.0.0.1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            started = next(line for line in process.stdout if "successfully on port" in line)
            port = int(started.rsplit(" ", 1)[1].strip(" .\n"))
            flags = [
                *FLAGS,
                f"--user-data-dir={folder / 'profile'}",
                f"--window-size={width},{height}",
            ]
            wanted = {
                "goog:chromeOptions": {"binary": binary, "args": flags},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                "timeouts": {"script": 120_000, "pageLoad": 120_000},
            }
            session = call(
                "POST",
                f"http://127.0.0.1:{port}/session",
                {"capabilities": {"alwaysMatch": wanted}},
            )
            browser = Browser(port, session["sessionId"])
            try:
                browser.resize(width, height)
                yield browser
            finally:
                call("DELETE", f"http://127.0.0.1:{port}/session/{session['sessionId']}", None)
        finally:
            process.terminate()
