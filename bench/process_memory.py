"""Another process's memory, from /proc (Linux)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_EVERY_S = 0.004


def status_bytes(pid: int | str, field: str) -> int:
    """`field` of /proc/PID/status: VmHWM, VmRSS, RssAnon, …"""
    return parse_status(Path(f"/proc/{pid}/status").read_text(), field)


def parse_status(text: str, field: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc tells no {field}")


@dataclass(slots=True)
class Peak:
    """Bytes of anonymous memory: at first, the most since, and at last."""

    before: int
    most: int
    after: int

    def above_before(self) -> int:
        return self.most - self.before


@contextmanager
def anonymous_peak(pid: int) -> Iterator[Peak]:
    """Look at the process's anonymous memory every few milliseconds: from here, so that it is not disturbed."""
    first = status_bytes(pid, "RssAnon")
    peak = Peak(first, first, first)
    stopping = threading.Event()

    def watch() -> None:
        while not stopping.wait(_EVERY_S):
            peak.most = max(peak.most, status_bytes(pid, "RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stopping.set()
        thread.join()
        peak.after = status_bytes(pid, "RssAnon")
        peak.most = max(peak.most, peak.after)
