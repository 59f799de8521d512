"""A plan as a user reads it, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from planner.explain import stage_rows
from planner.plan import Alternative, Plan
from potluck.terminal import gib, show_table, tell
from transport.messages import KVForm, WeightsForm

_WEIGHTS: dict[WeightsForm, str] = {
    "stored": "as in the file",
    "dense": "dense",
    "8-bit": "in 8 bits where the file has them dense",
    "4-bit": "in 4 bits where the file has them dense",
}
_KV: dict[KVForm, str] = {"full": "KV", "8-bit": "8-bit KV"}
_EXACT = {"auto", "latency", "throughput"}


def plan_json(model: str, plan: Plan) -> dict[str, Any]:
    prediction = plan.prediction
    return {
        "model": model,
        "id": plan.id,
        "strategy": plan.strategy,
        "weights": plan.weights,
        "kv": plan.kv,
        "is_exact": plan.is_exact,
        "wire_dtype": plan.wire_dtype,
        "context_tokens": plan.context_tokens,
        "kv_capacity_tokens": plan.kv_capacity_tokens,
        "predicted_tokens_per_s": prediction.tokens_per_s,
        "prediction": asdict(prediction),
        "stages": [asdict(row) for row in stage_rows(plan)],
        "left_out": [asdict(item) for item in plan.left_out],
        "advice": asdict(plan.advice) if plan.advice is not None else None,
    }


def show_plan(console: Console, model: str, plan: Plan) -> None:
    show_table(console, _table(model, plan))
    for line in _lines(plan):
        tell(console, line, markup=False)


def _table(model: str, plan: Plan) -> Table:
    table = Table(title=f"{escape(model)}: {plan.strategy} plan {plan.id}", title_justify="left")
    texts = ("device", "backend", "dtype", "layers")
    for heading in ("stage", *texts, "weights", "KV", "ms", "hop ms"):
        justify: Literal["left", "right"] = "left" if heading in texts else "right"
        table.add_column(heading, justify=justify, no_wrap=heading != "device", overflow="fold")
    for row in stage_rows(plan):
        table.add_row(
            str(row.stage),
            escape(row.device),
            row.backend,
            row.compute_dtype,
            f"{row.first}–{row.last - 1}",
            gib(row.weights_bytes),
            gib(row.kv_bytes),
            f"{row.predicted_ms_per_token:.1f}",
            f"{row.hop_ms:.2f}",
        )
    return table


def _lines(plan: Plan) -> list[str]:
    found = plan.prediction
    many = f"; {found.concurrency} chats: {found.tokens_per_s_many:.1f} tokens/s in all, "
    many += f"{found.workload_tokens_per_s:.1f} with their prompts"
    lines = [
        f"Predicted: one chat {found.tokens_per_s:.1f} tokens/s{many if found.concurrency > 1 else ''}; first token of "
        f"a prompt of {found.prompt_tokens} after {_seconds(found.ttft_s)}. Back to the engine: "
        f"{found.hops_s[-1] * 1e3:.2f} ms.",
        f"Weights {_WEIGHTS[plan.weights]}. Context {plan.context_tokens} tokens, {_KV[plan.kv]} for "
        f"{plan.kv_capacity_tokens} tokens in all.",
    ]
    if plan.advice is not None:
        lines += _advice_lines(plan)
    if plan.strategy in _EXACT and not plan.is_exact:
        lines.append("There may be a better plan: with this many unequal devices not all were tried.")
    return lines + [f"Left out {item.name}: {item.reason}" for item in plan.left_out]


def _advice_lines(plan: Plan) -> list[str]:
    advice = plan.advice
    if advice is None:
        return []
    lines = [f"What limits it: {advice.binding}."]
    if advice.best_single is None:
        lines.append("No single device holds the model.")
    elif len(plan.stages) > 1:
        lines.append(f"Best single device: {advice.best_single.what}, {_rates(plan, advice.best_single)}.")
    if advice.replicas is not None:
        lines.append(f"Two rings would serve more: {advice.replicas.what}, {_rates(plan, advice.replicas)}.")
    if advice.one_more is not None:
        more = advice.one_more
        same = abs(more.tokens_per_s / plan.prediction.tokens_per_s - 1) < 0.01
        same &= abs(more.tokens_per_s_many / plan.prediction.tokens_per_s_many - 1) < 0.01
        lines.append(f"With {more.what}: " + ("no faster." if same else f"{_rates(plan, more)}."))
    return lines


def _rates(plan: Plan, alternative: Alternative) -> str:
    one = f"one chat {alternative.tokens_per_s:.1f} tokens/s"
    if plan.prediction.concurrency == 1:
        return one
    return f"{one}, {plan.prediction.concurrency} chats {alternative.tokens_per_s_many:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
