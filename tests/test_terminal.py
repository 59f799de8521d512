"""What a user sees in a terminal of 80 columns."""

from __future__ import annotations

import io
from importlib.metadata import version

import pytest
from rich.console import Console
from typer.testing import CliRunner

from potluck.cli import app
from potluck.status import StageReport, StatusReport
from potluck.terminal import stage_table


def _stage(index: int, device: str) -> StageReport:
    return StageReport(
        stage=index,
        device=device,
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
        ms_per_token=123.45,
        pid=1,
        fault=None,
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_of_the_stage_table_is_cut(columns: int) -> None:
    report = StatusReport(
        model="tiny",
        url="http://127.0.0.1:1",
        state="ready",
        error=None,
        hint=None,
        pid=1,
        engine_pid=2,
        context_tokens=1,
        kv_capacity_tokens=1,
        stages=[_stage(0, "cpu-1"), _stage(1, "mlx"), _stage(2, "join-1234567/cuda:0")],
        idle_devices=[],
        logs="logs",
    )
    out = io.StringIO()
    Console(file=out, width=columns).print(stage_table(report))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    for words in (
        ("stage", "device", "backend", "layers", "weights", "KV used/plan", "resident", "ms/token"),
        ("0", "cpu-1", "torch", "0–39", "16.0 GiB", "512/9000 MiB", "17.0 GiB", "123.5"),
        ("80–119", "join-"),
    ):
        assert any(all(word in line for word in words) for line in lines), words


def test_the_version_and_the_commands() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout.split() == ["potluck", version("potluck")]
    assert "demo" in runner.invoke(app, ["--help"]).stdout
