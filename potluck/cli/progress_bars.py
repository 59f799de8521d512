"""Progress bars show a pull, and what a head does while it starts; a pull's progress is also written as JSON."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from potluck.cli.invitation import show_first_invitation
from potluck.cli.terminal import show_line
from potluck.head.pool import PoolWorker
from potluck.head.progress import HeadProgress
from potluck.store.sources import STAGE_LABELS, PullProgress, PullStage
from potluck.store.sources import ProgressCallback as PullCallback
from potluck.system.byte_sizes import format_bytes


@contextmanager
def head_progress(console: Console) -> Iterator[HeadProgress]:
    """For a head on that console, also after this: then bars come and go with what it loads anew."""
    display = _HeadDisplay(console)
    try:
        yield HeadProgress(
            say=display.say,
            measuring=display.measuring,
            loading=display.loading,
            show_invitation=lambda invite, code: show_first_invitation(console, invite, code),
            pulling=display.pulling,
        )
    finally:
        display.clear()


class _HeadDisplay:
    """Thread-safe. A line ends the bars; what still goes on shows its own again at once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def say(self, line: str) -> None:
        with self._lock:
            self._clear()
            show_line(self._console, line)

    def measuring(self, device: str, what: str) -> None:
        """A link between hosts is measured before devices are; of these several at once."""
        with self._lock:
            if any(name.startswith("link ") for name in self._tasks):
                self._clear()
            name = f"link {device}" if "link" in what else f"device {device}"
            self._show(name, f"measuring {device}: {what}", None, None)

    def loading(self, workers: Sequence[PoolWorker]) -> None:
        """One bar a stage, until all have loaded."""
        with self._lock:
            if all(worker.loaded is not None for worker in workers):
                self._clear()
                return
            for worker in workers:
                name, progress = worker.register.device, worker.loading
                if progress is not None:
                    what = f"{name} receives" if progress.phase == "fetch" else f"{name} reads"
                    self._show(f"stage {name}", what, progress.read_bytes, progress.total_bytes)

    def pulling(self, event: PullProgress) -> None:
        if event.says:
            self.say(escape(event.says))
        with self._lock:
            if event.done != event.total:
                self._show(event.stage, STAGE_LABELS[event.stage], event.done, event.total)
            elif event.stage in self._tasks:
                self._clear()

    def clear(self) -> None:
        with self._lock:
            self._clear()

    def _show(self, name: str, what: str, done: int | None, total: int | None) -> None:
        if not self._console.is_terminal:
            return
        if self._bars is None:
            words, amounts = TextColumn("  {task.description}", markup=False), TextColumn("{task.fields[amount]}")
            self._bars = Progress(words, BarColumn(), amounts, console=self._console, transient=True)
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(what, total=None, amount="")
        amount = f"{format_bytes(done)} of {format_bytes(total)}" if done is not None and total else ""
        self._bars.update(self._tasks[name], description=what, completed=done or 0, total=total or None, amount=amount)

    def _clear(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()


_JSON_INTERVAL_S = 0.5


@contextmanager
def pull_progress_bars(console: Console) -> Iterator[PullCallback]:
    """One bar a stage, gone when all is done."""
    bars = Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks: dict[PullStage, TaskID] = {}

    def show(event: PullProgress) -> None:
        if event.says:
            show_line(console, event.says, markup=False)
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(STAGE_LABELS[event.stage], total=event.total, amount="")
        bars.update(tasks[event.stage], completed=event.done, total=event.total, amount=_amount(event))

    with bars:
        yield show


def pull_progress_json(out: IO[str]) -> PullCallback:
    """One line for each stage's start and end, and every half second between."""
    last: tuple[PullStage | None, float] = (None, 0.0)

    def write(event: PullProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if not event.says and event.stage == last[0] and event.done != event.total and now - last[1] < _JSON_INTERVAL_S:
            return
        last = (event.stage, now)
        out.write(json.dumps(asdict(event)) + "\n")
        out.flush()

    return write


def _amount(event: PullProgress) -> str:
    if event.stage in ("waiting", "ingest") or not event.done:
        return ""
    done = f"{event.done / 1e6:,.0f}"
    return f"{done} MB" if event.total is None else f"{done} of {event.total / 1e6:,.0f} MB"
