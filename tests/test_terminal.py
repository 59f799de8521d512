"""What a user sees in a terminal of 80 columns."""

from __future__ import annotations

import io
from importlib.metadata import version

import pytest
from rich.console import Console
from typer.testing import CliRunner

from potluck.cli import app
from potluck.status import StageReport, StatusReport
from potluck.terminal import show_text, stage_table


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


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_of_the_stage_table_is_cut(columns: int) -> None:
    report = StatusReport(
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
        stages=[_stage(0, "cpu-1"), _stage(1, "mlx"), _stage(2, "join-1234567/cuda:0")],
        idle_devices=[],
        logs="logs",
    )
    out = io.StringIO()
    Console(file=out, width=columns).print(stage_table(report))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    for words in (
        ("stage", "device", "backend", "layers", "weights", "KV used/plan", "resident", "ms/token", "plan"),
        ("0", "cpu-1", "torch", "0–39", "16.0 GiB", "512/9000 MiB", "17.0 GiB", "123.5", "99.9"),
        ("80–119", "join-"),
    ):
        assert any(all(word in line for word in words) for line in lines), words


def test_the_version_and_the_commands() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout.split() == ["potluck", version("potluck")]
    assert "demo" in runner.invoke(app, ["--help"]).stdout


def _shown(text: str) -> str:
    out = io.StringIO()
    show_text(Console(file=out, force_terminal=True, width=20), text)
    return out.getvalue()


def test_a_model_says_text_and_never_commands_the_terminal() -> None:
    assert _shown("\x1b]0;title\x07\x1b[2Ja\rb\x9bc") == "]0;title[2Jabc"


def test_what_a_model_says_is_shown_as_it_is() -> None:
    text = "[bold]not markup[/bold]\n👩\u200d👩\u200d👧, नमस्ते and a line that is longer than the console"
    assert _shown(text) == text
