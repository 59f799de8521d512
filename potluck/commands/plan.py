"""`potluck plan MODEL`: how a model would be split over this host's devices, without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from planner.explain import predicted_tokens_per_s, stage_rows
from planner.plan import Plan
from potluck.offer import offered_devices
from potluck.options import (
    ConcurrencyOption,
    ConfigOption,
    ContextOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    ThreadsOption,
    settings_with,
)
from potluck.planning import plan_for
from potluck.session import model_of
from potluck.terminal import data, errors, gib


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    model: Annotated[str | None, typer.Argument(help="A model of the store, or a source to pull.")] = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = None,
    use_all: Annotated[
        bool, typer.Option("--use-all", help="Give every device a stage, also where it slows the others down.")
    ] = False,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say which device would run which layers, and what that takes, without loading anything."""
    settings = settings_with(
        config,
        model=model,
        devices=device,
        memory=memory,
        threads=threads,
        context=context,
        concurrency=concurrency,
        use_all_devices=use_all or None,
    )
    stored = model_of(settings, errors)
    found = plan_for(stored, offered_devices(settings, say=errors.print), settings)
    if json_output:
        facts = {
            "model": stored.name,
            "id": found.id,
            "strategy": found.strategy,
            "wire_dtype": found.wire_dtype,
            "context_tokens": found.context_tokens,
            "kv_capacity_tokens": found.kv_capacity_tokens,
            "predicted_tokens_per_s": predicted_tokens_per_s(found),
            "stages": [asdict(row) for row in stage_rows(found)],
            "left_out": [asdict(item) for item in found.left_out],
        }
        data.file.write(json.dumps(facts) + "\n")
        return
    show(stored.name, found)


def show(model: str, plan: Plan) -> None:
    table = Table(title=f"{model}: {plan.strategy} plan {plan.id}", title_justify="left")
    for heading in ("stage", "device", "backend", "dtype", "layers", "weights", "KV", "predicted ms"):
        table.add_column(heading, justify="left" if heading in ("device", "backend", "dtype", "layers") else "right")
    for row in stage_rows(plan):
        table.add_row(
            str(row.stage),
            row.device,
            row.backend,
            row.compute_dtype,
            f"{row.first}–{row.last - 1}",
            gib(row.weights_bytes),
            gib(row.kv_bytes),
            f"{row.predicted_ms_per_token:.1f}",
        )
    data.print(table)
    for item in plan.left_out:
        data.print(f"Left out {escape(item.name)}: {escape(item.reason)}", highlight=False, soft_wrap=True)
    data.print(
        f"Context {plan.context_tokens} tokens, KV for {plan.kv_capacity_tokens} tokens in all. At most "
        f"{predicted_tokens_per_s(plan):.1f} tokens/s for one chat, from reading the weights alone.",
        highlight=False,
        soft_wrap=True,
    )
