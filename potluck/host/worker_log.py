"""What the workers of a joined host have to say to its user: what went wrong with them, and which layers they hold.

Workers talk to their head, which may be on another host; here their logs are read as they grow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ (?P<level>[A-Z]+) (?P<text>.*)")
_HOLDS = re.compile(r"stage \d+ holds layers \[(?P<first>\d+), (?P<last>\d+)\)")
_HINT = "hint: "
_MAX_BYTES = 1 << 16


@dataclass(slots=True)
class _Log:
    device: str
    path: Path
    read_bytes: int = 0


class WorkerEventLog:
    """Of workers with these devices and logs. `new` is called some times a second."""

    def __init__(self, logs: Sequence[tuple[str, Path]]) -> None:
        self._logs = [_Log(device, path) for device, path in logs]

    def read_new(self) -> list[str]:
        """Lines in rich markup, of what was logged since the last call."""
        return [line for log in self._logs for line in _event_lines(log.device, _new_lines(log))]


def _new_lines(log: _Log) -> list[str]:
    try:
        with log.path.open("rb") as file:
            file.seek(log.read_bytes)
            data = file.read(_MAX_BYTES)
    except OSError:
        return []
    complete = data[: data.rfind(b"\n") + 1]
    log.read_bytes += len(complete)
    return complete.decode(errors="replace").splitlines()


def _event_lines(device: str, lines: Sequence[str]) -> Iterator[str]:
    is_wrong = False
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is not None:
            is_wrong = found["level"] == "ERROR"
            if is_wrong:
                yield f"[yellow]{escape(device)}: {escape(found['text'])}[/yellow]"
            elif (holds := _HOLDS.fullmatch(found["text"])) is not None:
                yield f"{escape(device)} holds layers {holds['first']}–{int(holds['last']) - 1}"
        elif is_wrong and line.startswith(_HINT):
            yield f"[dim]{escape(line)}[/dim]"
