"""`potluck up` serves a model over this host's devices and those that join."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import typer

from potluck.cli.options import (
    AllowHostOption,
    AllowOriginOption,
    ConcurrencyOption,
    ConfigOption,
    ContextOption,
    DeviceOption,
    EstimateOption,
    FreshOption,
    HostNameOption,
    HostOption,
    JsonOption,
    KVCacheOption,
    LanHostOption,
    LayersOption,
    MemoryOption,
    NoDiscoveryOption,
    NoLanOption,
    NoPrefixCacheOption,
    ObjectiveOption,
    OfflineOption,
    PortOption,
    QuantizeOption,
    RequireKeyOption,
    ThreadsOption,
    settings_with,
)
from potluck.cli.session import running_head_of
from potluck.cli.terminal import show_line, show_stages, stderr, stdout


def up(
    model: Annotated[str | None, typer.Argument(help="A model of the store, or a source to pull.")] = None,
    offline: OfflineOption = False,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = None,
    quantize: QuantizeOption = None,
    kv_cache: KVCacheOption = None,
    no_prefix_cache: NoPrefixCacheOption = False,
    host: HostOption = None,
    port: PortOption = None,
    require_key: RequireKeyOption = False,
    allow_host: AllowHostOption = None,
    allow_origin: AllowOriginOption = None,
    use_all: Annotated[
        bool, typer.Option("--use-all", help="Give every device a stage, also where it slows the others down.")
    ] = False,
    objective: ObjectiveOption = None,
    layers: LayersOption = None,
    fresh: FreshOption = False,
    estimate: EstimateOption = False,
    measure_in_turn: Annotated[
        bool, typer.Option("--measure-in-turn", help="Measure one device at a time, for hosts that share a machine.")
    ] = False,
    wait_for: Annotated[
        int | None, typer.Option("--wait-for", help="Wait until this many devices are in the pool.")
    ] = None,
    no_lan: NoLanOption = False,
    no_discovery: NoDiscoveryOption = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Let hosts in that know the code or the invite, without asking here.")
    ] = False,
    lan_host: LanHostOption = None,
    lan_port: Annotated[
        int | None,
        typer.Option("--lan-port", help="Port where other hosts knock. Default: 11501; 0: any free one."),
    ] = None,
    host_name: HostNameOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Serve MODEL at an OpenAI-compatible endpoint until Ctrl-C."""
    settings = settings_with(
        config,
        model=model,
        offline=offline,
        devices=device,
        memory=memory,
        threads=threads,
        context=context,
        concurrency=concurrency,
        quantize=quantize,
        kv_cache=kv_cache,
        no_prefix_cache=no_prefix_cache,
        host=host,
        port=port,
        require_key=require_key,
        allow_hosts=allow_host,
        allow_origins=allow_origin,
        wait_for=wait_for,
        use_all_devices=use_all or None,
        objective=objective,
        layers=layers,
        fresh=fresh or None,
        estimate=estimate or None,
        measure_in_turn=measure_in_turn or None,
        host_name=host_name,
        lan_host=lan_host,
        lan_port=lan_port,
        no_lan=no_lan,
        no_discovery=no_discovery,
        approve_all=yes or None,
    )
    console = stderr if json_output else stdout
    with running_head_of(settings, console) as head:
        report = head.report()
        show_stages(console, report)
        console.print(f"Serving {head.model_name} at [bold]{head.url}[/bold] (chat page there, API under /v1)")
        for line in head.opened.user_lines():
            show_line(console, line)
        console.print("Ctrl-C stops it.")
        if json_output:
            stdout.file.write(json.dumps(msgspec.to_builtins(report)) + "\n")
            stdout.file.flush()
        head.wait()
