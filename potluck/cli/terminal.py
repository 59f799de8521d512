"""The terminal gets data on stdout and everything else on stderr, wrapped, without control characters."""

from __future__ import annotations

import io
import re
import sys
import unicodedata

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


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
UNLIMITED_COLUMNS = 4096


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
        console = Console(file=console.file, width=UNLIMITED_COLUMNS)
    console.print(table, highlight=False)
