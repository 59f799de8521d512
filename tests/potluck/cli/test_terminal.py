"""What a user sees in a terminal of 80 columns."""

from __future__ import annotations

import io
from importlib.metadata import version

import pytest
from msgspec.structs import replace
from rich.console import Console
from typer.testing import CliRunner

from potluck.cli.app import app_for
from potluck.cli.status import show_stages
from potluck.cli.terminal import show_line, show_text
from potluck.head.status import StageReport, StatusReport


def _stage(index: int, device: str) -> StageReport:
    return StageReport(
        stage=index,
        device=device,
        host="here",
        backend="torch",
        kind="cpu",
        first=40 * index,
        last=40 * index + 40,
        dtype="bfloat16",
        weights_bytes=16 * 2**30,
        kv_bytes=512 * 2**20,
        kv_reserved_bytes=9000 * 2**20,
        kv_tokens=1,
        sequences=1,
        rss_bytes=17 * 2**30,
        bandwidth_bytes_per_s=1e10,
        ms_per_token=123.45,
        predicted_ms_per_token=99.9,
        ratio=1.0,
        is_off_s=None,
        decode_steps=1,
        decode_tokens=1,
        decode_s=0.1,
        prefill_tokens=1,
        prefill_s=0.1,
        pid=1,
        fault=None,
    )


def _report(*stages: StageReport) -> StatusReport:
    return StatusReport(
        model="tiny",
        url="http://127.0.0.1:1",
        lan=None,
        state="ready",
        error=None,
        hint=None,
        pid=1,
        engine_pid=2,
        context_tokens=1,
        kv_capacity_tokens=1,
        engine=None,
        plan=None,
        better_plan=None,
        stages=list(stages),
        idle_devices=[],
        logs="logs",
    )


def _stages_shown(report: StatusReport, columns: int, *, is_terminal: bool = True) -> list[str]:
    out = io.StringIO()
    show_stages(Console(file=out, width=columns, force_terminal=is_terminal, color_system=None), report)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_of_the_stage_table_is_cut(columns: int) -> None:
    lines = _stages_shown(_report(_stage(0, "cpu-1"), _stage(1, "mlx"), _stage(2, "join-1234567/cuda:0")), columns)
    assert max(map(len, lines)) <= columns
    for words in (
        ("stage", "device", "backend", "layers", "weights", "KV (plan)", "resident", "ms (plan)"),
        ("0", "cpu-1", "torch", "0–39", "16.0 GiB", "512 (9000) MiB", "17.0 GiB", "123.5 (99.9)"),
        ("80–119", "join-"),
    ):
        assert any(all(word in line for word in words) for line in lines), words


def test_names_of_another_host_stay_on_one_line_of_80_columns() -> None:
    usual = replace(
        _stage(0, "living-room-pc/cpu"),
        weights_bytes=900 * 2**20,
        kv_bytes=0,
        kv_reserved_bytes=800 * 2**20,
        rss_bytes=2**30,
        ms_per_token=18.5,
    )
    lines = _stages_shown(_report(usual), 80)
    assert len(lines) == 3
    assert "living-room-pc/cpu" in lines[2]


def test_no_row_is_broken_in_a_pipe_and_no_name_is_markup() -> None:
    name = "a-very-long-name-of-a-computer-[red]in-the-attic/cuda:0"
    lines = _stages_shown(_report(_stage(0, name)), 40, is_terminal=False)
    assert len(lines) == 3
    assert name in lines[2]


def test_lines_break_between_words_in_a_terminal_and_nowhere_in_a_pipe() -> None:
    path = "/home/user/" + 60 * "x"
    text = f"its log says more than fits into one line of this terminal: {path}"
    shown = []
    for is_terminal in (True, False):
        out = io.StringIO()
        show_line(Console(file=out, width=40, force_terminal=is_terminal, color_system=None), text, markup=False)
        shown.append(out.getvalue().splitlines())
    in_terminal, in_pipe = shown
    assert in_terminal == ["its log says more than fits into one", "line of this terminal:", path]
    assert in_pipe == [text]


def test_the_version_and_the_commands() -> None:
    runner = CliRunner()
    assert runner.invoke(app_for([]), ["--version"]).stdout.split() == ["potluck", version("potluck")]
    assert "demo" in runner.invoke(app_for([]), ["--help"]).stdout


def _shown(text: str) -> str:
    out = io.StringIO()
    show_text(Console(file=out, force_terminal=True, width=20), text)
    return out.getvalue()


def test_a_model_says_text_and_never_commands_the_terminal() -> None:
    assert _shown("\x1b]0;title\x07\x1b[2Ja\rb\x9bc") == "]0;title[2Jabc"


def test_what_a_model_says_is_shown_as_it_is() -> None:
    text = "[bold]not markup[/bold]\n👩\u200d👩\u200d👧, नमस्ते and a line that is longer than the console"
    assert _shown(text) == text
