"""Bars of a head's terminal are shown while something goes on, gone with the next line; none in a pipe."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from potluck.cli import session
from potluck.cli.progress_bars import head_progress
from potluck.head.progress import HeadProgress
from potluck.store.sources import PullProgress
from potluck.system.settings import Settings


def worker(name: str, *, read_bytes: int = 0, is_loaded: bool = False) -> Any:
    loading = SimpleNamespace(phase="fetch", read_bytes=read_bytes, total_bytes=100 * 2**20)
    return SimpleNamespace(
        register=SimpleNamespace(device=name), loading=loading, loaded=object() if is_loaded else None
    )


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)


def new_text(console: Console) -> str:
    out = console.file
    assert isinstance(out, io.StringIO)
    text = out.getvalue()
    out.seek(0)
    out.truncate()
    return text


def test_bars_come_and_go_also_when_the_ring_is_loaded_anew(console: Console) -> None:
    with head_progress(console) as progress:
        progress.measuring("attic", "the link to [red]study")
        progress.measuring("study/cpu", "decode of 1")
        progress.say("Loading tiny")
        assert "measuring study/cpu: decode of 1" in new_text(console)
        progress.loading([worker("study/cpu", read_bytes=30 * 2**20)])
        progress.loading([worker("study/cpu", is_loaded=True)])
        assert "study/cpu receives" in new_text(console)
    for _ in range(2):  # Long after it was up.
        progress.loading([worker("kitchen/cpu", read_bytes=30 * 2**20), worker("cpu", is_loaded=True)])
        progress.say("[bold red]The ring is down[/bold red]")
        shown = new_text(console)
        assert "kitchen/cpu receives" in shown
        assert "30 MiB of 100 MiB" in shown
        assert shown.rstrip().endswith("The ring is down")


def test_a_pull_shows_how_far_it_is_and_says_what_it_says(console: Console) -> None:
    with head_progress(console) as progress:
        progress.pulling(PullProgress(stage="download", done=10, total=20, says="from [the hub]"))
        progress.pulling(PullProgress(stage="download", done=20, total=20))
    assert "from [the hub]" in new_text(console)


def test_a_pipe_gets_lines_alone() -> None:
    out = io.StringIO()
    with head_progress(Console(file=out, width=80)) as progress:
        progress.measuring("cpu", "decode of 1")
        progress.loading([worker("cpu")])
        progress.say("Warming up")
    assert out.getvalue() == "Warming up\n"


def test_a_terminal_has_its_cursor_back_after_an_interrupt_while_the_ring_is_loaded_anew(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Head:
        def __init__(self, settings: Settings, model: object, progress: HeadProgress) -> None:
            self.progress = progress

        def __enter__(self) -> Head:
            return self

        def __exit__(self, *_: object) -> None:
            self.progress.measuring("cpu", "decode of 8")  # Until its threads have heard of it.

    monkeypatch.setattr(session, "start_head", Head)
    monkeypatch.setattr(session, "requested_model", lambda settings, console: None)
    monkeypatch.setattr(session, "_log_to_file", lambda: None)
    with session.running_head_of(Settings(), console) as head:
        head.progress.measuring("cpu", "decode of 1")  # type: ignore[attr-defined]
        raise KeyboardInterrupt
    shown = new_text(console)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.rstrip().endswith("Stopped.")
