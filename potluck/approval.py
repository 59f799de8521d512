"""Whether a host that knows the code may come in: the head's user says so, in its terminal or by `potluck approve`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.markup import escape

from devices.identity import fingerprint
from devices.pairing import Candidate
from potluck.answers import Answers, own_terminal
from transport.errors import BadRequest, DeadlineExceeded

WAIT_S = 110.0
_LOOK_S = 0.1
_SHORTEST_FINGERPRINT = 4


@dataclass(slots=True, eq=False)
class _Pending:
    candidate: Candidate
    allow: bool | None = None

    @property
    def is_over(self) -> bool:
        return self.allow is not None or self.candidate.gone.is_set()


class Approvals:
    """Hosts that wait to be let in. `allow_all` lets in whoever knows the code; `say` gets lines of rich markup."""

    def __init__(
        self,
        say: Callable[[str], object],
        *,
        allow_all: bool = False,
        wait_s: float = WAIT_S,
        terminal: Callable[[], Answers | None] = own_terminal,
    ) -> None:
        self._say = say
        self._allow_all = allow_all
        self._wait_s = wait_s
        self._terminal = terminal
        self._asking = threading.Lock()
        self._changed = threading.Condition()
        self._pending: list[_Pending] = []

    @property
    def pending(self) -> tuple[Candidate, ...]:
        with self._changed:
            return tuple(pending.candidate for pending in self._pending if not pending.is_over)

    def ask(self, candidate: Candidate) -> bool:
        """Wait for the user's answer. False also if the candidate goes away. Raises DeadlineExceeded without one."""
        if self._allow_all:
            self._say(f"{described(candidate)} joins")
            return True
        pending = _Pending(candidate)
        with self._changed:
            self._pending.append(pending)
        try:
            self._wait(pending)
        finally:
            with self._changed:
                self._pending.remove(pending)
        return self._told(pending)

    def answer(self, name: str, allow: bool) -> Candidate:
        """Of whoever waits under that name, or with a key whose fingerprint begins so. Raises BadRequest."""
        digits = name.lower().replace("-", "")
        with self._changed:
            waiting = [pending for pending in self._pending if not pending.is_over]
            fitting = [pending for pending in waiting if pending.candidate.name == name]
            if not fitting and len(digits) >= _SHORTEST_FINGERPRINT:
                fitting = [p for p in waiting if fingerprint(p.candidate.key).replace("-", "").startswith(digits)]
            if len(fitting) != 1:
                raise _not_one(name, waiting, fitting)
            fitting[0].allow = allow
            self._changed.notify_all()
            return fitting[0].candidate

    def _wait(self, pending: _Pending) -> None:
        deadline = time.monotonic() + self._wait_s
        terminal = self._terminal()
        if terminal is None:
            self._say_how(pending.candidate)
        is_asking = False
        try:
            while not pending.is_over and time.monotonic() < deadline:
                if terminal is None or not (is_asking or self._asking.acquire(blocking=False)):
                    with self._changed:  # Nobody can be asked here, or another one is being asked about.
                        self._changed.wait_for(lambda: pending.is_over, _LOOK_S)
                    continue
                if not is_asking:
                    is_asking = True
                    terminal.discard()
                    self._say(f"{described(pending.candidate)} wants to join. Allow? {escape('[y/N]')}")
                line = terminal.line(_LOOK_S)
                if line == "":  # The terminal is gone.
                    terminal = None
                    self._say_how(pending.candidate)
                elif line is not None:
                    with self._changed:
                        pending.allow = pending.allow or line.splitlines()[0].strip().lower() in ("y", "yes")
        finally:
            if is_asking:
                self._asking.release()

    def _say_how(self, candidate: Candidate) -> None:
        name = escape(candidate.name)
        self._say(f"{described(candidate)} wants to join. Let it in with: potluck approve {name}")

    def _told(self, pending: _Pending) -> bool:
        name = escape(pending.candidate.name)
        if pending.allow is not None:
            if not pending.allow:
                self._say(f"{name} is not let in")
            return pending.allow
        if pending.candidate.gone.is_set():
            self._say(f"{name} waits no longer")
            return False
        self._say(f"{name} is not let in: nobody said so within {self._wait_s:.0f} s")
        raise DeadlineExceeded(f"nobody let {name} in", hint="pair again, and answer: potluck approve NAME")


def described(candidate: Candidate) -> str:
    """ "kitchen-pc (key 3f2a-91bc-77d0-12e4, Linux x86-64, at 192.168.1.7)", in rich markup."""
    facts = (f"key {fingerprint(candidate.key)}", candidate.platform, f"at {candidate.address}")
    return escape(f"{candidate.name} ({', '.join(fact for fact in facts if fact)})")


def _not_one(name: str, waiting: list[_Pending], fitting: list[_Pending]) -> BadRequest:
    if fitting:
        prints = ", ".join(fingerprint(pending.candidate.key) for pending in fitting)
        hint = f"say which by its key's fingerprint: {prints}"
        return BadRequest(f"{len(fitting)} devices called {name} wait", hint=hint)
    names = ", ".join(pending.candidate.name for pending in waiting)
    return BadRequest(
        f"no device called {name} waits to be let in",
        hint=f"waiting: {names}" if names else "run potluck join on it first; it waits for two minutes",
    )
