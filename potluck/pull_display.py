"""A pull's progress: bars for people, lines of JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from potluck.store.progress import STAGE_LABELS, PullProgress, Stage
from potluck.store.progress import Progress as PullCallback
from potluck.terminal import tell

_JSON_EVERY_S = 0.5


@contextmanager
def shown_progress(console: Console) -> Iterator[PullCallback]:
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
    tasks: dict[Stage, TaskID] = {}

    def show(event: PullProgress) -> None:
        if event.says:
            tell(console, event.says, markup=False)
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(STAGE_LABELS[event.stage], total=event.total, amount="")
        bars.update(tasks[event.stage], completed=event.done, total=event.total, amount=_amount(event))

    with bars:
        yield show


def json_progress(out: IO[str]) -> PullCallback:
    """One line for each stage's start and end, and every half second between."""
    last: tuple[Stage | None, float] = (None, 0.0)

    def write(event: PullProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if not event.says and event.stage == last[0] and event.done != event.total and now - last[1] < _JSON_EVERY_S:
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
