"""`potluck status`: what the head on this host does."""

from __future__ import annotations

import json

import msgspec
import typer
from rich.markup import escape

from potluck.ask import call
from potluck.head_file import running_head
from potluck.options import JsonOption
from potluck.status import BetterPlanReport, EngineReport, StatusReport
from potluck.terminal import data, gib, stage_table


def register(app: typer.Typer) -> None:
    app.command("status")(status)


def status(json_output: JsonOption = False) -> None:
    """Show the running head: its model, stages, memory, and times."""
    head = running_head()
    report = call(head, "GET", "/potluck/status", StatusReport)
    if json_output:
        data.file.write(json.dumps(msgspec.to_builtins(report)) + "\n")
        return
    show(report)


def show(report: StatusReport) -> None:
    data.print(stage_table(report))
    if report.plan is not None:
        plan = report.plan
        data.print(
            f"Plan {plan.id} ({plan.strategy}, {plan.weights} weights, {plan.kv} KV): predicted "
            f"{plan.tokens_per_s:.1f} tokens/s for one chat, {plan.tokens_per_s_many:.1f} for {plan.concurrency}, "
            f"first token of {plan.prompt_tokens} after {plan.ttft_s:.2f} s; limited by {plan.limit}",
            highlight=False,
            soft_wrap=True,
        )
    if report.engine is not None:
        data.print(_engine_line(report.engine, report.kv_capacity_tokens), highlight=False, soft_wrap=True)
    for stage in report.stages:
        if stage.is_off_s is not None:
            data.print(
                f"[yellow]Stage {stage.stage} ({escape(stage.device)}) takes {stage.ratio:.2f}× what was predicted, "
                f"for {stage.is_off_s:.0f} s now[/yellow]",
                highlight=False,
            )
    if report.better_plan is not None:
        show_better(report.better_plan)
    for stage in report.stages:
        if stage.fetched:
            sources = ", ".join(f"{count / 1e6:,.0f} MB from {escape(name)}" for name, count in stage.fetched.items())
            data.print(f"{escape(stage.device)} got {sources} in {stage.fetch_s:.1f} s", highlight=False)
    for host in report.hosts:
        data.print(
            f"Connected: {escape(host.name)} ({escape(host.platform)}, {escape(host.address)}) with "
            f"{escape(', '.join(host.devices) or 'no device yet')}",
            highlight=False,
        )
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


def _engine_line(engine: EngineReport, capacity_tokens: int) -> str:
    return (
        f"{engine.running_requests} requests running, {engine.queued_requests} waiting; of KV for {capacity_tokens} "
        f"tokens {engine.kv_tokens} in use, {engine.cached_kv_tokens} kept for prompts that begin alike"
    )


def show_better(better: BetterPlanReport) -> None:
    data.print(
        f"A better plan exists, since {escape(better.why)}: {better.tokens_per_s:.1f} tokens/s instead of "
        f"{better.now_tokens_per_s:.1f} ({escape(', '.join(better.stages))}). Apply it with: potluck replan",
        highlight=False,
        soft_wrap=True,
    )
