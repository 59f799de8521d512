"""The terminal gets data on stdout and everything else on stderr, wrapped, without control characters."""

from __future__ import annotations

import io
import re
import sys
import unicodedata
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from potluck.system.byte_sizes import format_bytes

if TYPE_CHECKING:
    from potluck.head.status import StatusReport


def replace_unencodable() -> None:
    """What stdout and stderr can't say becomes "?". On Windows, what goes to a file or a pipe is UTF-8, not its code
    page, which lacks most characters."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue  # None where there is no console; a test's own.
        if sys.platform == "win32" and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="replace")
        else:
            stream.reconfigure(errors="replace")


stdout = Console()
stderr = Console(stderr=True)
_UNLIMITED_COLUMNS = 4096


def strip_controls(text: str) -> str:
    """Without what would command the terminal; much of what is told comes from other hosts."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def show_text(console: Console, text: str) -> None:
    """A piece of a model's answer as it is, but for what would command the terminal: escapes, bells, returns."""
    console.print(strip_controls(text), end="", markup=False, highlight=False, soft_wrap=True)


def show_line(console: Console, text: str, *, markup: bool = True) -> None:
    """A line or a paragraph: wrapped between words in a terminal, as it is in a pipe. A word that is longer than the
    terminal is wide, such as a path, stays one word to whoever copies it."""
    text = strip_controls(text)
    words = Text.from_markup(text) if markup else Text(text)
    if console.is_terminal:
        lines = words.divide(_line_starts(words.plain, console.width))
        for line in lines:
            line.rstrip()
        words = Text("\n").join(lines)
    console.print(words, soft_wrap=True, highlight=False)


def _line_starts(text: str, columns: int) -> list[int]:
    """Where lines of at most so many columns begin, after the first; a longer word has a line of its own."""
    starts: list[int] = []
    used = 0
    for word in re.finditer(r"\S+\s*|\s+", text):
        if used and used + cell_len(word[0].rstrip()) > columns:
            starts.append(word.start())
            used = 0
        used = 0 if "\n" in word[0] else used + cell_len(word[0])
    return starts


def show_table(console: Console, table: Table) -> None:
    """Into a pipe no row is broken."""
    if not console.is_terminal:
        console = Console(file=console.file, width=_UNLIMITED_COLUMNS)
    console.print(table, highlight=False)


def show_stages(console: Console, report: StatusReport) -> None:
    """The ring's stages, one a row, with as much between the columns as there is room for; a device's name that is
    still too long is folded, never cut."""
    roomy = stage_table(report, gap=2)
    widest = console.measure(roomy, options=console.options.update(width=_UNLIMITED_COLUMNS)).maximum
    fits = widest <= console.width or not console.is_terminal
    show_table(console, roomy if fits else stage_table(report, gap=1))


def stage_table(report: StatusReport, *, gap: int) -> Table:
    """With `gap` spaces between columns."""
    table = Table(
        title=f"{escape(report.model)}: {report.state}",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
    )
    for heading in ("stage", "device", "backend", "layers", "weights", "KV (plan)", "resident", "ms (plan)"):
        is_text = heading in ("device", "backend", "layers")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "device", overflow="fold")
    for stage in report.stages:
        measured_ms = f"{stage.ms_per_token:.1f}" if stage.ms_per_token is not None else "–"
        table.add_row(
            str(stage.stage),
            escape(stage.device),
            stage.backend,
            f"{stage.first}–{stage.last - 1}",
            format_bytes(stage.weights_bytes) if stage.weights_bytes else "–",
            f"{stage.kv_bytes / 2**20:.0f} ({stage.kv_reserved_bytes / 2**20:.0f}) MiB",
            format_bytes(stage.rss_bytes) if stage.rss_bytes else "–",
            f"{measured_ms} ({stage.predicted_ms_per_token:.1f})",
        )
    return table
