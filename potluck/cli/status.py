"""`potluck status` shows what the head of this host does; `potluck replan` applies a better plan."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potluck.cli.options import JsonOption
from potluck.cli.terminal import UNLIMITED_COLUMNS, show_line, show_table, stdout
from potluck.head.client import get_from_head, post_to_head
from potluck.head.status import BetterPlanReport, EngineReport, StatusReport
from potluck.system.byte_sizes import format_bytes


def status(json_output: JsonOption = False) -> None:
    """Show the running head: its model, stages, memory, and times."""
    report = get_from_head("/potluck/status", StatusReport)
    if json_output:
        stdout.file.write(json.dumps(msgspec.to_builtins(report)) + "\n")
        return
    show_status(report)


def show_status(report: StatusReport) -> None:
    show_stages(stdout, report)
    for line in _status_lines(report):
        show_line(stdout, line)


def show_stages(console: Console, report: StatusReport) -> None:
    """The ring's stages, one a row, with as much between the columns as there is room for; a device's name that is
    still too long is folded, never cut."""
    roomy = stage_table(report, gap=2)
    widest = console.measure(roomy, options=console.options.update(width=UNLIMITED_COLUMNS)).maximum
    fits = widest <= console.width or not console.is_terminal
    show_table(console, roomy if fits else stage_table(report, gap=1))


def stage_table(report: StatusReport, *, gap: int) -> Table:
    """With `gap` spaces between columns."""
    table = Table(
        title=f"{escape(report.model)}: {report.state}",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
    )
    for heading in ("stage", "device", "backend", "layers", "weights", "KV (plan)", "resident", "ms (plan)"):
        is_text = heading in ("device", "backend", "layers")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "device", overflow="fold")
    for stage in report.stages:
        measured_ms = f"{stage.ms_per_token:.1f}" if stage.ms_per_token is not None else "–"
        table.add_row(
            str(stage.stage),
            escape(stage.device),
            stage.backend,
            f"{stage.first}–{stage.last - 1}",
            format_bytes(stage.weights_bytes) if stage.weights_bytes else "–",
            f"{stage.kv_bytes / 2**20:.0f} ({stage.kv_reserved_bytes / 2**20:.0f}) MiB",
            format_bytes(stage.rss_bytes) if stage.rss_bytes else "–",
            f"{measured_ms} ({stage.predicted_ms_per_token:.1f})",
        )
    return table


def _status_lines(report: StatusReport) -> Iterator[str]:
    if report.plan is not None:
        plan = report.plan
        yield (
            f"Plan {plan.id} ({plan.strategy}, {plan.weights} weights, {plan.kv} KV): predicted "
            f"{plan.tokens_per_s:.1f} tokens/s for one chat, {plan.tokens_per_s_many:.1f} for {plan.concurrency}, "
            f"first token of {plan.prompt_tokens} after {plan.ttft_s:.2f} s; limited by {escape(plan.limit)}"
        )
    if report.engine is not None:
        yield _engine_line(report.engine, report.kv_capacity_tokens)
    yield from _deviation_lines(report)
    if report.better_plan is not None:
        yield better_plan_line(report.better_plan)
    for stage in report.stages:
        if stage.fetched:
            sources = ", ".join(f"{format_bytes(count)} from {escape(name)}" for name, count in stage.fetched.items())
            yield f"{escape(stage.device)} got {sources} in {stage.fetch_s:.1f} s"
    yield from _device_lines(report)
    yield (
        f"{report.url}, context {report.context_tokens} tokens, KV for {report.kv_capacity_tokens} tokens, "
        f"head process {report.pid}, logs in {escape(report.logs)}"
    )
    if report.error:
        yield f"[bold red]{escape(report.error)}[/bold red]"
        if report.hint:
            yield f"[cyan]hint:[/cyan] {escape(report.hint)}"


def _device_lines(report: StatusReport) -> Iterator[str]:
    """Hosts that are connected, those that wait, and devices that have no stage."""
    for host in report.hosts:
        devices = escape(", ".join(host.devices) or "no device yet")
        yield f"Connected: {escape(host.name)} ({escape(host.platform)}, {escape(host.address)}) with {devices}"
    for waiting in report.waiting:
        name = escape(waiting.name)
        yield f"{name} ({escape(waiting.address)}) waits to be let in, or not: potluck approve {name}"
    for device in report.idle_devices:
        free = format_bytes(device.free_bytes)
        yield f"Not in the ring: {escape(device.device)} ({free} free): {escape(device.reason)}"


def _deviation_lines(report: StatusReport) -> Iterator[str]:
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


def better_plan_line(better: BetterPlanReport) -> str:
    return (
        f"A better plan exists, since {escape(better.why)}: {better.tokens_per_s:.1f} tokens/s instead of "
        f"{better.now_tokens_per_s:.1f} ({escape(', '.join(better.stages))}). Apply it with: potluck replan"
    )


class ReplanReply(msgspec.Struct, frozen=True):
    better_plan: BetterPlanReport | None


def replan(json_output: JsonOption = False) -> None:
    """Apply the better plan, if there is one, as soon as nobody waits for an answer."""
    answer = post_to_head("/potluck/replan", {}, ReplanReply)
    if json_output:
        stdout.file.write(json.dumps(msgspec.to_builtins(answer)) + "\n")
    elif answer.better_plan is None:
        stdout.print("The ring runs by the best plan known.")
    else:
        show_line(stdout, better_plan_line(answer.better_plan))
        show_line(stdout, "It is loaded as soon as nobody waits for an answer; see: potluck status")
