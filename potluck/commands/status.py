"""`potluck status`: what the head on this host does."""

from __future__ import annotations

import json

import httpx
import msgspec
import typer
from rich.markup import escape

from potluck.head_file import running_head
from potluck.options import JsonOption
from potluck.status import StatusReport
from potluck.terminal import data, gib, stage_table
from transport.errors import NotRunning


def register(app: typer.Typer) -> None:
    app.command("status")(status)


def status(json_output: JsonOption = False) -> None:
    """Show the running head: its model, stages, memory, and times."""
    head = running_head()
    try:
        response = httpx.get(f"{head.url}/potluck/status", timeout=10.0, trust_env=False)
        report = msgspec.json.decode(response.content, type=StatusReport)
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        raise NotRunning(
            f"the head (process {head.pid}) does not answer at {head.url}: {error}", hint="is it still starting?"
        ) from error
    if json_output:
        data.file.write(json.dumps(msgspec.to_builtins(report)) + "\n")
        return
    show(report)


def show(report: StatusReport) -> None:
    data.print(stage_table(report))
    for device in report.idle_devices:
        data.print(
            f"Not in the ring: {escape(device.device)} ({gib(device.free_bytes)} free): {escape(device.reason)}",
            highlight=False,
        )
    data.print(
        f"{report.url}, context {report.context_tokens} tokens, KV for {report.kv_capacity_tokens} tokens, "
        f"head process {report.pid}, logs in {report.logs}",
        highlight=False,
        soft_wrap=True,
    )
    if report.error:
        data.print(f"[bold red]{escape(report.error)}[/bold red]")
        if report.hint:
            data.print(f"[cyan]hint:[/cyan] {escape(report.hint)}", soft_wrap=True)
