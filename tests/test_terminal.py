"""What a model says reaches the terminal as text, and never as a command to it."""

from __future__ import annotations

import io

from rich.console import Console

from potluck.terminal import show_text


def shown(text: str) -> str:
    out = io.StringIO()
    show_text(Console(file=out, force_terminal=True, width=20), text)
    return out.getvalue()


def test_control_characters_are_left_out() -> None:
    assert shown("\x1b]0;title\x07\x1b[2Ja\rb\x9bc") == "]0;title[2Jabc"


def test_all_other_text_is_as_it_was() -> None:
    text = "[bold]not markup[/bold]\n\ttab, 👩\u200d👩\u200d👧, नमस्ते and a line that is longer than the console"
    assert shown(text) == text.replace("\t", "        ") or shown(text) == text
