"""`potluck status`: what the head on this host does."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import typer
from rich.markup import escape

from potluck.ask import call
from potluck.head_file import running_head
from potluck.options import JsonOption
from potluck.status import BetterPlanReport, EngineReport, StatusReport
from potluck.terminal import data, gib, show_stages, tell


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
    show_stages(data, report)
    for line in _lines(report):
        tell(data, line)


def _lines(report: StatusReport) -> Iterator[str]:
    if report.plan is not None:
        plan = report.plan
        yield (
            f"Plan {plan.id} ({plan.strategy}, {plan.weights} weights, {plan.kv} KV): predicted "
            f"{plan.tokens_per_s:.1f} tokens/s for one chat, {plan.tokens_per_s_many:.1f} for {plan.concurrency}, "
            f"first token of {plan.prompt_tokens} after {plan.ttft_s:.2f} s; limited by {escape(plan.limit)}"
        )
    if report.engine is not None:
        yield _engine_line(report.engine, report.kv_capacity_tokens)
    yield from _deviations(report)
    if report.better_plan is not None:
        yield better_line(report.better_plan)
    for stage in report.stages:
        if stage.fetched:
            sources = ", ".join(f"{gib(count)} from {escape(name)}" for name, count in stage.fetched.items())
            yield f"{escape(stage.device)} got {sources} in {stage.fetch_s:.1f} s"
    for host in report.hosts:
        devices = escape(", ".join(host.devices) or "no device yet")
        yield f"Connected: {escape(host.name)} ({escape(host.platform)}, {escape(host.address)}) with {devices}"
    for waiting in report.waiting:
        name = escape(waiting.name)
        yield f"{name} ({escape(waiting.address)}) waits to be let in, or not: potluck approve {name}"
    for device in report.idle_devices:
        yield f"Not in the ring: {escape(device.device)} ({gib(device.free_bytes)} free): {escape(device.reason)}"
    yield (
        f"{report.url}, context {report.context_tokens} tokens, KV for {report.kv_capacity_tokens} tokens, "
        f"head process {report.pid}, logs in {escape(report.logs)}"
    )
    if report.error:
        yield f"[bold red]{escape(report.error)}[/bold red]"
        if report.hint:
            yield f"[cyan]hint:[/cyan] {escape(report.hint)}"


def _deviations(report: StatusReport) -> Iterator[str]:
    """Stages that are off their plan, and why that may be."""
    off = [stage for stage in report.stages if stage.is_off_s is not None]
    for stage in off:
        what = f"Stage {stage.stage} ({escape(stage.device)}) takes {stage.ratio:.2f}× what was predicted"
        yield f"[yellow]{what}, for {stage.is_off_s:.0f} s now[/yellow]"
    if any(stage.ratio > 1 for stage in off):
        yield "What is slower than predicted has other programs beside it, or is hot or on battery."
    if any(stage.ratio < 1 for stage in off):
        yield (
            "What is faster than predicted was measured while other programs ran: start again with potluck up --fresh, "
            "which measures anew."
        )


def _engine_line(engine: EngineReport, capacity_tokens: int) -> str:
    return (
        f"{engine.running_requests} requests running, {engine.queued_requests} waiting; of KV for {capacity_tokens} "
        f"tokens {engine.kv_tokens} in use, {engine.cached_kv_tokens} kept for prompts that begin alike"
    )


def better_line(better: BetterPlanReport) -> str:
    return (
        f"A better plan exists, since {escape(better.why)}: {better.tokens_per_s:.1f} tokens/s instead of "
        f"{better.now_tokens_per_s:.1f} ({escape(', '.join(better.stages))}). Apply it with: potluck replan"
    )
