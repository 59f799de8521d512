"""`potluck plan MODEL`: how a model would be split over devices, and what that would do, without loading it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from devices.device import LeftOut
from planner.advice import advised
from planner.estimate import estimated_pool
from planner.measured import PoolTimes
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.workload import Workload
from potluck.config import Settings
from potluck.hypothetical import parse_hypothetical, pool_with
from potluck.offer import offered_devices
from potluck.options import (
    ConcurrencyOption,
    ConfigOption,
    ContextOption,
    DeviceOption,
    JsonOption,
    KVCacheOption,
    LayersOption,
    MemoryOption,
    ObjectiveOption,
    QuantizeOption,
    ThreadsOption,
    settings_with,
)
from potluck.plan_view import plan_json, show_plan
from potluck.planning import chosen_weights, estimated_times, kv_of, plan_with, profile_of, workload_of
from potluck.profiling import local_times_for
from potluck.saved_pool import load_pool, save_pool
from potluck.session import model_of
from potluck.terminal import data, errors, tell
from transport.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    model: Annotated[str | None, typer.Argument(help="A model of the store, or a source to pull.")] = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = None,
    quantize: QuantizeOption = None,
    kv_cache: KVCacheOption = None,
    prompt: Annotated[int | None, typer.Option("--prompt", help="Tokens of a usual prompt.")] = None,
    output: Annotated[int | None, typer.Option("--output", help="Tokens of a usual answer.")] = None,
    objective: ObjectiveOption = None,
    layers: LayersOption = None,
    use_all: Annotated[
        bool, typer.Option("--use-all", help="Give every device a stage, also where it slows the others down.")
    ] = False,
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
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Estimate times from bandwidth: quicker than measuring layers, less true."),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say which device would run which layers, and what that takes and gives, without loading anything."""
    settings = settings_with(
        config,
        model=model,
        devices=device,
        memory=memory,
        threads=threads,
        context=context,
        concurrency=concurrency,
        quantize=quantize,
        kv_cache=kv_cache,
        use_all_devices=use_all or None,
        objective=objective,
        layers=layers,
        fresh=fresh or None,
    )
    left_out: tuple[LeftOut, ...] = ()
    if pool is not None:
        asked = quantize is not None or settings.quantize != Settings().quantize
        profile, times = _saved(pool, settings, asked=asked)
        if kv_cache is not None or settings.kv_cache != Settings().kv_cache:
            profile = replace(profile, kv=kv_of(settings))
    else:
        profile, times, left_out = _here(settings, estimate=estimate)
    if save is not None:
        save_pool(save, profile, times)
    for text in with_ or ():
        times = pool_with(times, profile, parse_hypothetical(text))
    times = _without(times, without or ())
    found = _plan(profile, times, settings, _with_lengths(workload_of(profile, settings), prompt, output))
    found = replace(found, left_out=(*left_out, *found.left_out))
    if json_output:
        data.file.write(json.dumps(plan_json(profile.name, found)) + "\n")
    else:
        show_plan(data, profile.name, found)


def _plan(profile: ModelProfile, times: PoolTimes, settings: Settings, workload: Workload) -> Plan:
    with errors.status("Planning") as status:

        def progress(searches: int) -> None:
            status.update(f"Planning: {searches} searches")

        found = plan_with(profile, times, settings, workload, progress=progress)
        return advised(profile, times, workload, found, progress)


def _here(settings: Settings, *, estimate: bool) -> tuple[ModelProfile, PoolTimes, tuple[LeftOut, ...]]:
    """This host's devices, and those that could not be measured."""
    stored = model_of(settings, errors)
    devices = offered_devices(settings, say=_say, is_head=True)
    weights = chosen_weights(profile_of(stored), devices, devices[0].host, settings, _say)
    profile = profile_of(stored, weights, kv_of(settings))
    if estimate:
        return profile, estimated_times(stored, devices, devices[0].host, weights), ()
    with errors.status("Measuring this host's devices") as status:
        times, left_out = local_times_for(
            stored,
            devices,
            say=_say,
            doing=lambda device, what: status.update(f"Measuring {device}: {what}"),
            weights=weights,
            fresh=settings.fresh,
        )
    return profile, times, left_out


def _saved(path: Path, settings: Settings, *, asked: bool) -> tuple[ModelProfile, PoolTimes]:
    """The file's times, for its own model and form of weights; for others they are estimated from its devices'
    bandwidths. `asked`: the settings say which form."""
    saved = load_pool(path)
    profile = saved.profile
    if settings.model is not None and settings.model != profile.name:
        profile = profile_of(model_of(settings, errors))
    devices = [times.device for times in saved.times.devices]
    weights = saved.profile.weights
    if asked:
        weights = chosen_weights(profile, devices, saved.times.head, settings, _say)
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
    tell(errors, line)


def _without(times: PoolTimes, names: list[str] | tuple[str, ...]) -> PoolTimes:
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
