"""What the terminal of a head shows: lines of what happens, and bars while it measures, pulls or loads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from potluck.invitation import show_first_invitation
from potluck.pool import PoolWorker
from potluck.progress import HeadProgress
from potluck.store.progress import STAGE_LABELS, PullProgress
from potluck.terminal import gib, tell


@contextmanager
def head_progress(console: Console) -> Iterator[HeadProgress]:
    """For a head on that console, also after this: then bars come and go with what it loads anew."""
    display = _HeadDisplay(console)
    try:
        yield HeadProgress(
            say=display.say,
            doing=display.doing,
            tick=display.tick,
            invite=lambda invite, code: show_first_invitation(console, invite, code),
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
            tell(self._console, line)

    def doing(self, device: str, what: str) -> None:
        """A link between hosts is measured before devices are; of these several at once."""
        with self._lock:
            if any(name.startswith("link ") for name in self._tasks):
                self._clear()
            name = f"link {device}" if "link" in what else f"device {device}"
            self._show(name, f"measuring {device}: {what}", None, None)

    def tick(self, workers: Sequence[PoolWorker]) -> None:
        """One bar a stage, until all have loaded."""
        with self._lock:
            if all(worker.loaded is not None for worker in workers):
                self._clear()
                return
            for worker in workers:
                name, loading = worker.register.device, worker.loading
                if loading is not None:
                    what = f"{name} receives" if loading.phase == "fetch" else f"{name} reads"
                    self._show(f"stage {name}", what, loading.read_bytes, loading.total_bytes)

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
        amount = f"{gib(done)} of {gib(total)}" if done is not None and total else ""
        self._bars.update(self._tasks[name], description=what, completed=done or 0, total=total or None, amount=amount)

    def _clear(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()
