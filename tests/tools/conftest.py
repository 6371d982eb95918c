"""A headless Chromium, driven through chromedriver's own protocol (W3C WebDriver)."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the protocol gives elements
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return call(f"{self._session}/{path}", body)

    def open(self, address: str) -> None:
        self._call("url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns in the page."""
        return self._call("execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        return self._call("element", {"using": "css selector", "value": selector})[_ELEMENT]

    def click(self, selector: str, x: int = 0, y: int = 0) -> None:
        """Press the mouse, x and y pixels from the middle of an element."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        origin = {_ELEMENT: self.find(selector)}
        moves = [
            {"type": "pointerMove", "origin": origin, "x": x, "y": y, "duration": 0},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        self._call("actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def keys(self, selector: str, text: str) -> None:
        """Type; into a file input: choose that file."""
        self._call(f"element/{self.find(selector)}/value", {"text": text})

    def wait(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """What a function body returns as soon as that is true."""
        return until(lambda: self.run(script, *arguments), seconds, script)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("screenshot")))


@contextmanager
def browser(profile: Path, width: int = 1500, height: int = 1000) -> Iterator[Browser]:
    """A browser with an empty profile in a folder that does not exist yet."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(
            line.rstrip(".\n").rsplit(" ", 1)[1]
            for line in driver.stdout
            if "started successfully on port" in line
        )
        flags = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": flags}}
        address = f"http://127.0.0.1:{port}/session"
        session = call(address, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(f"{address}/{session}")
        finally:
            call(f"{address}/{session}", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=20)
        driver.stdout.close()


def call(address: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data=data, method=method)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from error


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds: {what}")


@pytest.fixture
def page(tmp_path):
    """A browser's window; the test is skipped where there is no browser."""
    for names in (("chromedriver",), ("chromium", "google-chrome", "chrome")):
        if not any(map(shutil.which, names)):
            pytest.skip(f"there is no {names[0]} (apt install chromium chromium-driver)")
    with browser(tmp_path / "profile") as window:
        yield window
