"""Output that never fails over a character: a model's answer has emoji in it, a file's name may have anything."""

from __future__ import annotations

import io
import sys


def speak_plainly() -> None:
    """What stdout and stderr can't say becomes "?". On Windows, what goes to a file or a pipe is UTF-8, not its code
    page, which lacks most characters."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue  # None where there is no console; a test's own.
        if sys.platform == "win32" and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="replace")
        else:
            stream.reconfigure(errors="replace")
