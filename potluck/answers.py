"""Lines that the user types while a command does other things."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import Protocol


class Answers(Protocol):
    """Where the user answers a question."""

    def discard(self) -> None:
        """Forget what was typed before the question was there."""

    def line(self, timeout_s: float) -> str | None:
        """What was typed, with its end of line; None if nothing was in that time; empty at the end of input."""


class TerminalAnswers:
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


def own_terminal() -> TerminalAnswers | None:
    """None without one, and for a process in its background, which reading would stop. On Windows none is used: a
    console can't be read with a time limit there."""
    if sys.platform == "win32" or sys.stdin is None or sys.stdin.closed:
        return None
    try:
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
            return TerminalAnswers(descriptor)
    except (OSError, ValueError):
        return None
    return None
