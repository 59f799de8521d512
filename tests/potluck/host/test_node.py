"""What a joined host's user is told of its workers."""

from __future__ import annotations

from pathlib import Path

from potluck.host.node import WorkerEventLog


def test_errors_and_layers_are_told_once_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    news = WorkerEventLog([("study/cpu", log)])
    assert news.read_new() == []
    log.write_text(
        "2026-11-24 20:36:46,613 INFO fetched nothing in 0.0 s\n"
        "2026-11-24 20:36:46,613 INFO stage 1 holds layers [25, 30)\n"
        "2026-11-24 20:36:47,613 ERROR 34 MB are needed [here]; 25 MB are free\nhint: make room\n"
        "Traceback (most recent call last):\n"
        "2026-11-24 20:36:48,613 ERROR cut o"
    )
    assert news.read_new() == [
        "study/cpu holds layers 25–29",
        "[yellow]study/cpu: 34 MB are needed \\[here]; 25 MB are free[/yellow]",
        "[dim]hint: make room[/dim]",
    ]
    assert news.read_new() == []
    with log.open("a") as file:
        file.write("ff\n")
    assert news.read_new() == ["[yellow]study/cpu: cut off[/yellow]"]
