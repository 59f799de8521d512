"""What a user sees in a terminal: data on stdout, everything else on stderr."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from rich.table import Table

from potluck.invitation import show_invitation
from potluck.pool import PoolWorker
from potluck.progress import HeadProgress
from potluck.status import StatusReport

data = Console()
errors = Console(stderr=True)


def show_text(console: Console, text: str) -> None:
    """A piece of a model's answer as it is, but for what would command the terminal: escapes, bells, returns."""
    harmless = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
    console.print(harmless, end="", markup=False, highlight=False, soft_wrap=True)


def gib(num_bytes: float) -> str:
    """ "1.5 GiB", "57 MiB"."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


@contextmanager
def head_progress(console: Console) -> Iterator[HeadProgress]:
    """Lines of what happens, and one bar a stage while weights load."""
    bars = Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}
    measuring: dict[str, TaskID] = {}
    lock = threading.Lock()

    def say(line: str) -> None:
        console.print(line, highlight=False)

    def tick(workers: Sequence[PoolWorker]) -> None:
        while measuring:
            bars.remove_task(measuring.popitem()[1])
        for worker in workers:
            name = worker.register.device
            if worker.loading is None:
                continue
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=worker.loading.total_bytes)
            loading = worker.loading
            what = f"{name} receives" if loading.phase == "fetch" else f"{name} reads"
            bars.update(tasks[name], description=what, completed=loading.read_bytes, total=loading.total_bytes)

    def doing(device: str, what: str) -> None:
        with lock:
            if device not in measuring:
                measuring[device] = bars.add_task("", total=None)
            bars.update(measuring[device], description=f"measuring {device}: {what}")

    with bars:
        yield HeadProgress(
            say=say, doing=doing, tick=tick, invite=lambda invite, code: show_invitation(console, invite, code)
        )


def stage_table(report: StatusReport) -> Table:
    """The ring's stages, one a row. All of it fits into 80 characters; a long device name is folded, never cut."""
    table = Table(
        title=f"{report.model}: {report.state}", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for heading in ("stage", "device", "backend", "layers", "weights", "KV used/plan", "resident", "ms/token", "plan"):
        is_text = heading in ("device", "backend", "layers")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "device", overflow="fold")
    for stage in report.stages:
        table.add_row(
            str(stage.stage),
            stage.device,
            stage.backend,
            f"{stage.first}–{stage.last - 1}",
            gib(stage.weights_bytes),
            f"{stage.kv_bytes / 2**20:.0f}/{stage.kv_reserved_bytes / 2**20:.0f} MiB",
            gib(stage.rss_bytes),
            f"{stage.ms_per_token:.1f}" if stage.ms_per_token is not None else "–",
            f"{stage.predicted_ms_per_token:.1f}",
        )
    return table
