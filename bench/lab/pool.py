"""A pool in a lab, as users make one: a head in one host, `potluck join` in others, nothing shared but the network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from bench.head_process import CLI, CommandProcess
from bench.lab.lab import Lab

_SHOWN_WITHIN_S = 60.0
_ASKED_WITHIN_S = 120.0
_LOOK_S = 0.02
_DEVICE = ("--device", "torch:cpu", "--threads", "1")
_ASK = """
import httpx, sys
body = {"messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 16, "temperature": 0}
answer = httpx.post(sys.argv[1] + "/v1/chat/completions", json={"model": sys.argv[2], **body}, timeout=100)
answer.raise_for_status()
print(answer.json()["choices"][0]["message"]["content"])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What a head shows when it starts."""

    invite: str
    code: str


class LabPool:
    """`with LabPool(lab, head, model, options) as pool`: the head is starting. `join` starts a host. Nothing stays."""

    def __init__(
        self, lab: Lab, head: str, model: str, options: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._lab = lab
        self._head = head
        self._model = model
        self._options = options
        self._environment = environment
        self._stack = ExitStack()
        self._process: CommandProcess
        self.joined: dict[str, CommandProcess] = {}

    def __enter__(self) -> Self:
        own = ("--host-name", self._head, "--port", "0", "--yes", "--json")
        self._process = self._start(self._head, ["up", self._model, *_DEVICE, *own, *self._options])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def invitation(self) -> Invitation:
        """Raises RuntimeError if the head shows none."""
        words = self._wait_for(r"potluck join '(potluck://[^']*)'")
        code = re.search(r"potluck join ([0-9A-Z]{4}-[0-9A-Z]{4})", self._process.said)
        if code is None:
            raise RuntimeError(f"the head shows no code: {self._process.last_words()}")
        return Invitation(invite=words[1], code=code[1])

    def join(self, host: str, *how: str) -> CommandProcess:
        """`potluck join` with these arguments; without any it finds the pool that it is paired with."""
        self.joined[host] = self._start(host, ["join", *how, "--host-name", host, *_DEVICE])
        return self.joined[host]

    def load_s(self) -> float:
        """How long the last ring took to load, from the orders to the stages until all had it."""
        heard = list(self._process.heard)
        began = max(at for at, line in heard if line.startswith("Loading ") and " over " in line)
        return min(at for at, line in heard if line.startswith("Warming up") and at >= began) - began

    def wait_until_up(self, timeout_s: float) -> dict[str, Any]:
        """What the head says of itself. Raises RuntimeError, also with what the hosts say."""
        try:
            return self._process.wait_for_facts(timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {self._joined_say()}") from error

    def status(self) -> dict[str, Any]:
        """Raises RuntimeError."""
        done = self._lab.run(
            self._head, [*CLI, "status", "--json"], limited=False, environment=self._environment, timeout_s=60.0
        )
        if done.returncode:
            raise RuntimeError(f"no status: {done.stderr.strip()}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def num_loads(self) -> int:
        """How often a ring was loaded."""
        return self._process.said.count("Warming up")

    def wait_for_ring(self, hosts: Sequence[str], timeout_s: float, *, loads: int = 1) -> dict[str, Any]:
        """Until one is ready with stages of these hosts, in this order, after so many loads. Raises RuntimeError."""
        deadline = time.monotonic() + timeout_s
        while True:
            report = self.status()
            found = [stage["host"] for stage in report["stages"]]
            if report["state"] == "ready" and found == list(hosts) and self.num_loads() >= loads:
                return report
            if time.monotonic() > deadline:
                what = f"{report['state']} with {found} after {timeout_s:.0f} s"
                raise RuntimeError(f"{what}: {self._process.last_words()}; {self._joined_say()}")
            time.sleep(0.5)

    def answer(self, url: str) -> str:
        """Of the ring, to one question, without chance. Raises RuntimeError."""
        command = [sys.executable, "-c", _ASK, url, self._model]
        done = self._lab.run(self._head, command, limited=False, timeout_s=_ASKED_WITHIN_S)
        if done.returncode:
            raise RuntimeError(f"no answer: {(done.stderr.strip().splitlines() or [''])[-1]}")
        return done.stdout.strip()

    def _joined_say(self) -> str:
        return "; ".join(f"{name}: {process.last_words()}" for name, process in self.joined.items())

    def _wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + _SHOWN_WITHIN_S
        while (found := re.search(pattern, self._process.said)) is None:
            if self._process.exit_code() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head does not say {pattern!r}: {self._process.last_words()}")
            time.sleep(_LOOK_S)
        return found

    def _start(self, host: str, arguments: Sequence[str]) -> CommandProcess:
        def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
            environment = {"OMP_NUM_THREADS": "1", **(self._environment or {})}
            return self._lab.popen(host, command, environment=environment, **options)

        process = CommandProcess(arguments, popen)
        self._stack.callback(process.stop)
        return process
