"""`potluck plan` shows how a model would be split over devices, without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from devices.hardware.device import UnavailableDevice
from planner.explain import stage_rows, with_advice
from planner.measurements import PoolTimes, estimated_pool
from planner.memory import ModelProfile
from planner.options import Workload
from planner.plan import Alternative, Plan
from potluck.cli.options import JsonOption, with_settings
from potluck.cli.plan_inputs import add_hypothetical, load_pool, parse_hypothetical, save_pool
from potluck.cli.session import stored_model
from potluck.cli.terminal import show_line, show_table, stderr, stdout
from potluck.head.planning import choose_weights, estimate_times, kv_of, plan_with, profile_of, workload_of
from potluck.head.profiling.measure import MeasureOptions, local_times_for
from potluck.host.local_devices import find_local_devices
from potluck.system.byte_sizes import format_bytes
from potluck.system.settings import GivenValue, Settings
from transport.errors import ConfigError
from transport.messages.ring import KVForm, WeightsForm


@with_settings(
    "model",
    "device",
    "memory",
    "threads",
    "context",
    "concurrency",
    "quantize",
    "kv_cache",
    "objective",
    "layers",
    "use_all",
    "fresh",
    "estimate",
)
def plan(
    settings: Settings,
    given: Mapping[str, GivenValue],
    prompt: Annotated[int | None, typer.Option("--prompt", help="Tokens of a usual prompt.")] = None,
    output: Annotated[int | None, typer.Option("--output", help="Tokens of a usual answer.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="A device to do without; repeat it.")] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help='A device that you don\'t have: "name,mem=24GiB,bw=1000GB/s" and, if known, tflops=80, link=1GB/s, '
            "latency=0.5ms, kind=cuda|mps|mlx|cpu; repeat it.",
        ),
    ] = None,
    pool: Annotated[Path | None, typer.Option("--pool", help="Plan for the pool of this file.")] = None,
    save: Annotated[Path | None, typer.Option("--save-pool", help="Save what was measured to this file.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Show which device would run which layers, and what that takes and gives, without loading anything."""
    left_out: tuple[UnavailableDevice, ...] = ()
    if pool is not None:
        profile, times = _from_pool_file(pool, settings, form_given="quantize" in given)
        if "kv_cache" in given:
            profile = replace(profile, kv=kv_of(settings))
    else:
        profile, times, left_out = _measure_local_devices(settings)
    if save is not None:
        save_pool(save, profile, times)
    for text in with_ or ():
        times = add_hypothetical(times, profile, parse_hypothetical(text))
    times = _exclude_devices(times, without or ())
    found = _make_plan(profile, times, settings, _with_lengths(workload_of(profile, settings), prompt, output))
    found = replace(found, left_out=(*left_out, *found.left_out))
    if json_output:
        stdout.file.write(json.dumps(plan_json(profile.name, found)) + "\n")
    else:
        show_plan(stdout, profile.name, found)


def _make_plan(profile: ModelProfile, times: PoolTimes, settings: Settings, workload: Workload) -> Plan:
    with stderr.status("Planning") as status:

        def progress(searches: int) -> None:
            status.update(f"Planning: {searches} searches")

        found = plan_with(profile, times, settings, workload, progress=progress)
        return with_advice(profile, times, workload, found, progress)


def _measure_local_devices(settings: Settings) -> tuple[ModelProfile, PoolTimes, tuple[UnavailableDevice, ...]]:
    """This host's devices, and those that could not be measured."""
    stored = stored_model(settings, stderr)
    devices = find_local_devices(settings, say=_say, is_head=True)
    weights = choose_weights(profile_of(stored), devices, devices[0].host, settings, _say)
    profile = profile_of(stored, weights, kv_of(settings))
    if settings.estimate:
        return profile, estimate_times(stored, devices, devices[0].host, weights), ()
    with stderr.status("Measuring this host's devices") as status:
        times, left_out = local_times_for(
            stored,
            devices,
            say=_say,
            measuring=lambda device, what: status.update(f"Measuring {device}: {what}"),
            options=MeasureOptions(weights=weights, fresh=settings.fresh),
        )
    return profile, times, left_out


def _from_pool_file(path: Path, settings: Settings, *, form_given: bool) -> tuple[ModelProfile, PoolTimes]:
    """The file's times, for its own model and form of weights; for others they are estimated from its devices'
    bandwidths. `asked`: the settings say which form."""
    saved = load_pool(path)
    profile = saved.profile
    if settings.model is not None and settings.model != profile.name:
        profile = profile_of(stored_model(settings, stderr))
    devices = [times.device for times in saved.times.devices]
    weights = saved.profile.weights
    if form_given:
        weights = choose_weights(profile, devices, saved.times.head, settings, _say)
    profile = replace(profile, weights=weights)
    if (profile.name, weights) == (saved.profile.name, saved.profile.weights):
        return profile, saved.times
    _say(
        f"{path} was measured with {saved.profile.name} ({saved.profile.weights} weights): times of {profile.name} "
        f"({weights} weights) are estimates"
    )
    estimated = estimated_pool(profile, devices, saved.times.head)
    return profile, replace(saved.times, devices=estimated.devices)


def _say(line: str) -> None:
    show_line(stderr, line)


def _exclude_devices(times: PoolTimes, names: list[str] | tuple[str, ...]) -> PoolTimes:
    have = [each.device.name for each in times.devices]
    for name in names:
        if name not in have:
            raise ConfigError(f"--without names {name}, which is not in the pool", hint=f"it has: {', '.join(have)}")
    return replace(times, devices=tuple(each for each in times.devices if each.device.name not in names))


def _with_lengths(workload: Workload, prompt: int | None, output: int | None) -> Workload:
    found = replace(
        workload,
        prompt_tokens=workload.prompt_tokens if prompt is None else prompt,
        output_tokens=workload.output_tokens if output is None else output,
    )
    if found.prompt_tokens + found.output_tokens > found.context_tokens:
        raise ConfigError(
            f"a prompt of {found.prompt_tokens} and an answer of {found.output_tokens} tokens do not go into a context "
            f"of {found.context_tokens}",
            hint="raise --context, or lower --prompt or --output",
        )
    return found


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
        "stages": stage_rows(plan),
        "left_out": [asdict(item) for item in plan.left_out],
        "advice": asdict(plan.advice) if plan.advice is not None else None,
    }


def show_plan(console: Console, model: str, plan: Plan) -> None:
    show_table(console, _stage_table(model, plan))
    for line in _summary_lines(plan):
        show_line(console, line, markup=False)


def _stage_table(model: str, plan: Plan) -> Table:
    table = Table(title=f"{escape(model)}: {plan.strategy} plan {plan.id}", title_justify="left")
    texts = ("device", "backend", "dtype", "layers")
    for heading in ("stage", *texts, "weights", "KV", "ms", "hop ms"):
        justify: Literal["left", "right"] = "left" if heading in texts else "right"
        table.add_column(heading, justify=justify, no_wrap=heading != "device", overflow="fold")
    for index, stage in enumerate(plan.stages):
        table.add_row(
            str(index),
            escape(stage.device),
            stage.backend,
            stage.compute_dtype,
            f"{stage.first}–{stage.last - 1}",
            format_bytes(stage.weights_bytes),
            format_bytes(stage.kv_bytes),
            f"{stage.decode_s * 1e3:.1f}",
            f"{stage.hop_s * 1e3:.2f}",
        )
    return table


def _summary_lines(plan: Plan) -> list[str]:
    found = plan.prediction
    many = f"; {found.concurrency} chats: {found.tokens_per_s_many:.1f} tokens/s in all, "
    many += f"{found.workload_tokens_per_s:.1f} with their prompts"
    lines = [
        f"Predicted: one chat {found.tokens_per_s:.1f} tokens/s{many if found.concurrency > 1 else ''}; first token of "
        f"a prompt of {found.prompt_tokens} after {_format_seconds(found.ttft_s)}. Back to the engine: "
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


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
