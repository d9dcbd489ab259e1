"""A headless Chromium, driven as WebDriver has it: by HTTP and JSON."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.support.leaks import children
from tests.support.waiting import DEADLINE, is_alive, wait_until

OPTIONS = {
    "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    "goog:chromeOptions": {
        "args": [
            *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"),
            *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
        ]
    },
}


class Browser:
    """A window. ``element`` and the like take a CSS selector."""

    def __init__(self, session: str) -> None:
        self._session = session

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return _ask(f"{self._session}/{path}", body)

    def open(self, url: str) -> None:
        self._ask("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a function's body in the page, and return what it returns."""
        return self._ask("execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """Return what an element shows; empty if there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def click(self, selector: str) -> None:
        """Click on an element as a person would."""
        self._act(selector, "click", {})

    def press(self, selector: str, keys: str) -> None:
        """Press keys in an element."""
        self._act(selector, "value", {"text": keys})

    def _act(self, selector: str, what: str, body: dict[str, Any]) -> None:
        """Do something with an element; again, if the page has replaced it since, or has not laid it out yet."""

        def is_done() -> bool:
            element = self._ask("element", {"using": "css selector", "value": selector})
            try:
                self._ask(f"element/{next(iter(element.values()))}/{what}", body)
            except AssertionError as error:
                if not any(why in str(error) for why in ("stale element", "not interactable")):
                    raise
                return False
            return True

        wait_until(is_done, f"{what} of {selector}")

    def wait_for(self, selector: str, pattern: str) -> str:
        """Wait until an element shows a text that matches a pattern; return that text."""
        return self.wait_until(lambda: self.text(selector), lambda text: re.search(pattern, text), f"{pattern!r}")

    def wait_until(self, read: Callable[[], str], condition: Callable[[str], object], what: str) -> str:
        begin = time.monotonic()
        while not condition(text := read()):
            assert time.monotonic() - begin < DEADLINE, f"waited in vain for {what} in {text!r}; {self.trouble()}"
            time.sleep(0.05)
        return text

    def trouble(self) -> list[str]:
        """Return what the browser's console has said since it was last asked."""
        return [entry["message"] for entry in self._ask("se/log", {"type": "browser"})]

    def requested(self) -> set[str]:
        """Return the addresses that pages have asked for since the last time."""
        entries = [json.loads(it["message"])["message"] for it in self._ask("se/log", {"type": "performance"})]
        return {it["params"]["request"]["url"] for it in entries if it["method"] == "Network.requestWillBeSent"}

    def emulate(self, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """Be another device."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)

    def picture(self, path: Path | str, *, whole: bool = False) -> None:
        """Write what is shown, or the whole page, as a PNG file."""
        found = self._devtools("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def _devtools(self, command: str, params: dict[str, Any]) -> Any:
        return self._ask("goog/cdp/execute", {"cmd": command, "params": params})


@contextmanager
def browser(profile: str) -> Iterator[Browser]:
    """A browser with nothing in it; ``profile`` is a directory for what it writes, sockets among it: a short path."""
    home = {"HOME": profile, "TMPDIR": profile, "XDG_RUNTIME_DIR": profile}
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"],
        env={**os.environ, **home},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout
    session = ""
    try:
        port = next(int(found[1]) for line in driver.stdout if (found := re.search(r"started.* port (\d+)", line)))
        here = f"http://127.0.0.1:{port}"
        made = _ask(f"{here}/session", {"capabilities": {"alwaysMatch": {"browserName": "chrome", **OPTIONS}}})
        session = f"{here}/session/{made['sessionId']}"
        yield Browser(session)
    finally:
        helpers = psutil.Process(driver.pid).children(recursive=True)
        if session:
            _ask(session, None, "DELETE")
        driver.send_signal(signal.SIGTERM)
        driver.wait(DEADLINE)
        # Those that it has started since have become children of this process.
        wait_until(
            lambda: (
                not any(is_alive(it.pid) for it in (*helpers, *children()) if it in helpers or "chrom" in it.name())
            ),
            "the end of the browser's processes",
        )
        driver.stdout.close()


def _ask(url: str, body: dict[str, Any] | None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as reply:
            return json.load(reply)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(json.load(error)["value"]["message"]) from None
