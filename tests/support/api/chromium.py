"""A real headless Chromium is driven over a pipe by its own protocol. It reaches loopback and nothing else."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(_PROGRAM is None, reason="needs Chromium: apt install chromium")

_ANSWER_WITHIN_S = 60.0
_ARGUMENTS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",
    "--no-pings",
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-client-side-phishing-detection",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-quic",
    "--disable-sync",
    "--metrics-recording-only",
    "--disable-features=MediaRouter,DialMediaRouteProvider,OptimizationHints,AutofillServerCommunication",
    # Every other name is unknown: nothing leaves this machine.
    "--host-resolver-rules=MAP *.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


class Browser:
    """Sends commands, gets answers; events are left out."""

    def __init__(self, folder: str) -> None:
        assert _PROGRAM is not None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Away from 3 and 4, where the browser looks for its ends.
        far = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]

        def move() -> None:
            os.dup2(far[0], 3)
            os.dup2(far[1], 4)

        self._process = subprocess.Popen(
            [_PROGRAM, *_ARGUMENTS, f"--user-data-dir={folder}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=move,
            pass_fds=(3, 4),
            start_new_session=True,
        )
        for end in (theirs_in, theirs_out, *far):
            os.close(end)
        self._input = os.fdopen(ours_out, "wb", buffering=0)
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(ours_in,), daemon=True)
        self._reader.start()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._input.write(json.dumps(message).encode() + b"\0")
        with self._changed:
            is_here = self._changed.wait_for(lambda: number in self._answers, _ANSWER_WITHIN_S)
            assert is_here, f"no answer to {method}"
            answer = self._answers.pop(number)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> Page:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        page.go(url)
        return page

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10.0)
        self._input.close()

    def _read(self, descriptor: int) -> None:
        rest = b""
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            while piece := stream.read(65536):
                *messages, rest = (rest + piece).split(b"\0")
                with self._changed:
                    for message in map(json.loads, messages):
                        if "id" in message:
                            self._answers[message["id"]] = message
                    self._changed.notify_all()


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def go(self, url: str) -> None:
        self._browser.send("Page.navigate", self._session, url=url)

    def reload(self) -> None:
        self._browser.send("Page.reload", self._session)

    def value(self, expression: str) -> Any:
        """Of JavaScript; a promise is waited for."""
        found = self._browser.send(
            "Runtime.evaluate", self._session, expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, condition: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        # A page that is still on its way has none of its parts.
        attempt = f"(() => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }})()"
        while not self.value(attempt):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}; {self.value(_SHOWN)}"
            time.sleep(0.05)

    def history(self) -> list[str]:
        entries = self._browser.send("Page.getNavigationHistory", self._session)["entries"]
        return [entry["url"] for entry in entries]


_SHOWN = "location.href + ' ' + document.body?.innerText.slice(0, 500)"


@contextmanager
def chromium() -> Iterator[Browser]:
    folder = tempfile.mkdtemp(prefix="chromium-")
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.close()
        shutil.rmtree(folder, ignore_errors=True)
