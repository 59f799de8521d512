"""Approvals hold the hosts that wait to be let in until the user decides, here or with `potluck approve`."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rich.markup import escape

from devices.pairing.identity import fingerprint
from devices.pairing.pake import Candidate
from transport.errors import BadRequest, DeadlineExceeded


class StdinPrompts(Protocol):
    """Where the user answers a question."""

    def discard(self) -> None:
        """Forget what was typed before the question was there."""

    def line(self, timeout_s: float) -> str | None:
        """What was typed, with its end of line; None if nothing was in that time; empty at the end of input."""


class TerminalPrompts:
    """Those typed in this process's own terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def discard(self) -> None:
        if sys.platform != "win32":
            import termios

            # One that is gone says so to whoever reads.
            with contextlib.suppress(termios.error):
                termios.tcflush(self._descriptor, termios.TCIFLUSH)

    def line(self, timeout_s: float) -> str | None:
        readable, _, _ = select.select([self._descriptor], [], [], timeout_s)
        if not readable:
            return None
        try:
            return os.read(self._descriptor, 1024).decode(errors="replace")
        except OSError:
            return ""


def terminal_prompts() -> TerminalPrompts | None:
    """None without one, and for a process in its background, which reading would stop. On Windows none is used: a
    console can't be read with a time limit there."""
    if sys.platform == "win32" or sys.stdin is None or sys.stdin.closed:
        return None
    try:
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
            return TerminalPrompts(descriptor)
    except (OSError, ValueError):
        return None
    return None


APPROVAL_TIMEOUT_S = 110.0
_POLL_S = 0.1
_MIN_FINGERPRINT_DIGITS = 4


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
        wait_s: float = APPROVAL_TIMEOUT_S,
        terminal: Callable[[], StdinPrompts | None] = terminal_prompts,
    ) -> None:
        self._say = say
        self._allow_all = allow_all
        self._wait_s = wait_s
        self._terminal = terminal
        self._prompt_lock = threading.Lock()
        self._changed = threading.Condition()
        self._pending: list[_Pending] = []

    @property
    def pending(self) -> tuple[Candidate, ...]:
        with self._changed:
            return tuple(pending.candidate for pending in self._pending if not pending.is_over)

    def wait_for_decision(self, candidate: Candidate) -> bool:
        """Wait for the user's answer. False also if the candidate goes away. Raises DeadlineExceeded without one."""
        if self._allow_all:
            self._say(f"{describe_candidate(candidate)} joins")
            return True
        pending = _Pending(candidate)
        with self._changed:
            self._pending.append(pending)
        try:
            self._wait(pending)
        finally:
            with self._changed:
                self._pending.remove(pending)
        return self._decision(pending)

    def decide(self, name: str, allow: bool) -> Candidate:
        """Of whoever waits under that name, or with a key whose fingerprint begins so. Raises BadRequest."""
        digits = name.lower().replace("-", "")
        with self._changed:
            waiting = [pending for pending in self._pending if not pending.is_over]
            matching = [pending for pending in waiting if pending.candidate.name == name]
            if not matching and len(digits) >= _MIN_FINGERPRINT_DIGITS:
                matching = [p for p in waiting if fingerprint(p.candidate.key).replace("-", "").startswith(digits)]
            if len(matching) != 1:
                raise _no_single_match(name, waiting, matching)
            matching[0].allow = allow
            self._changed.notify_all()
            return matching[0].candidate

    def _wait(self, pending: _Pending) -> None:
        deadline = time.monotonic() + self._wait_s
        terminal = self._terminal()
        if terminal is None:
            self._show_how_to_approve(pending.candidate)
        is_asking = False
        try:
            while not pending.is_over and time.monotonic() < deadline:
                if terminal is None or not (is_asking or self._prompt_lock.acquire(blocking=False)):
                    with self._changed:  # Nobody can be asked here, or another one is being asked about.
                        self._changed.wait_for(lambda: pending.is_over, _POLL_S)
                    continue
                if not is_asking:
                    is_asking = True
                    terminal.discard()
                    self._say(f"{describe_candidate(pending.candidate)} wants to join. Allow? {escape('[y/N]')}")
                line = terminal.line(_POLL_S)
                if line == "":  # The terminal is gone.
                    terminal = None
                    self._show_how_to_approve(pending.candidate)
                elif line is not None:
                    with self._changed:
                        pending.allow = pending.allow or line.splitlines()[0].strip().lower() in ("y", "yes")
        finally:
            if is_asking:
                self._prompt_lock.release()

    def _show_how_to_approve(self, candidate: Candidate) -> None:
        name = escape(candidate.name)
        self._say(f"{describe_candidate(candidate)} wants to join. Let it in with: potluck approve {name}")

    def _decision(self, pending: _Pending) -> bool:
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


def describe_candidate(candidate: Candidate) -> str:
    """ "kitchen-pc (key 3f2a-91bc-77d0-12e4, Linux x86-64, at 192.168.1.7)", in rich markup."""
    facts = (f"key {fingerprint(candidate.key)}", candidate.platform, f"at {candidate.address}")
    return escape(f"{candidate.name} ({', '.join(fact for fact in facts if fact)})")


def _no_single_match(name: str, waiting: list[_Pending], matching: list[_Pending]) -> BadRequest:
    if matching:
        prints = ", ".join(fingerprint(pending.candidate.key) for pending in matching)
        hint = f"say which by its key's fingerprint: {prints}"
        return BadRequest(f"{len(matching)} devices called {name} wait", hint=hint)
    names = ", ".join(pending.candidate.name for pending in waiting)
    return BadRequest(
        f"no device called {name} waits to be let in",
        hint=f"waiting: {names}" if names else "run potluck join on it first; it waits for two minutes",
    )
