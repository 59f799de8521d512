"""Options that several commands share, and how they override the settings file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from potluck.system.paths import config_file
from potluck.system.settings import Settings, load_settings, parse_bytes, validated

# The API's own default is 1, as OpenAI documents it; a small model rambles there.
DEFAULT_TEMPERATURE = 0.7

DeviceOption = Annotated[
    list[str] | None,
    typer.Option("--device", help="A device to use, such as torch:cpu, cuda:0, mps or mlx; repeat it. Default: all."),
]
MemoryOption = Annotated[str | None, typer.Option("--memory", help='Most memory a device gives, such as "8GiB".')]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="Threads that the workers on this host's CPU have together, at least one each. Default: its physical "
        "cores.",
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="How stages hold matrices: stored (as in the file, the default), dense, 8 or 4 (what the file has dense "
        "in so many bits), or auto (the first of stored, 8 and 4 that fits).",
    ),
]
KVCacheOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        help="How stages hold the KV of chats: full (in what they compute in, the default), or 8-bit, about half of "
        "that: answers then differ a little.",
    ),
]
NoPrefixCacheOption = Annotated[
    bool,
    typer.Option(
        "--no-prefix-cache",
        help="Compute every prompt anew, instead of keeping the KV of earlier ones for prompts that begin alike.",
    ),
]
ContextOption = Annotated[
    int | None, typer.Option("--context", help="Tokens of context. Default: 4096, or the model's if less.")
]
ConcurrencyOption = Annotated[
    int | None, typer.Option("--concurrency", help="Chats of full context that KV memory is reserved for.")
]
ObjectiveOption = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="What the plan is best at: auto (that many chats), latency (one chat), throughput; or a simple rule: "
        "proportional (to bandwidth), memory, even.",
    ),
]
LayersOption = Annotated[
    str | None, typer.Option("--layers", help='Layers by hand, in the ring\'s order, such as "mac=20,gpu=12".')
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Measure devices and links again.")]
EstimateOption = Annotated[
    bool, typer.Option("--estimate", help="Plan from bandwidths, without measuring layers and links.")
]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        help="The endpoint's address: 127.0.0.1 by default; 0.0.0.0 serves this host's network, with an API key.",
    ),
]
RequireKeyOption = Annotated[
    bool, typer.Option("--require-key", help="Ask programs of this host for the API key too; see: potluck key.")
]
AllowHostOption = Annotated[
    list[str] | None, typer.Option("--allow-host", help="Another name that the endpoint answers to; repeat it.")
]
AllowOriginOption = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", help="Let pages of another origin ask, such as http://localhost:3000; repeat it."),
]
PortOption = Annotated[int | None, typer.Option("--port", help="The endpoint's port; 0 for any free one.")]
NoLanOption = Annotated[bool, typer.Option("--no-lan", help="Keep other hosts out: nothing listens on the network.")]
NoDiscoveryOption = Annotated[
    bool, typer.Option("--no-discovery", help="Neither tell the network that a pool is here nor look for one.")
]
LanHostOption = Annotated[
    str | None, typer.Option("--lan-host", help="This host's IPv4 address for the others. Default: found out.")
]
HostNameOption = Annotated[
    str | None, typer.Option("--host-name", help="This host's name in the pool. Default: the system's.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Settings file (TOML).")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Take models from this host and the pool; ask no hub and no package index. HF_HUB_OFFLINE=1 says it too.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts as JSON on stdout.")]


def settings_with(
    config: Path | None = None,
    *,
    model: str | None = None,
    offline: bool = False,
    devices: list[str] | None = None,
    memory: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    concurrency: int | None = None,
    host: str | None = None,
    port: int | None = None,
    require_key: bool = False,
    allow_hosts: list[str] | None = None,
    allow_origins: list[str] | None = None,
    wait_for: int | None = None,
    quantize: str | None = None,
    kv_cache: str | None = None,
    no_prefix_cache: bool = False,
    use_all_devices: bool | None = None,
    objective: str | None = None,
    layers: str | None = None,
    fresh: bool | None = None,
    estimate: bool | None = None,
    measure_in_turn: bool | None = None,
    host_name: str | None = None,
    lan_host: str | None = None,
    lan_port: int | None = None,
    no_lan: bool = False,
    no_discovery: bool = False,
    approve_all: bool | None = None,
) -> Settings:
    """The config file's settings with what the command line says on top. Raises ConfigError."""
    base = load_settings(config_file() if config is None else _existing_file(config))
    overrides = {
        "model": model,
        "offline": offline or None,
        "devices": tuple(devices) if devices else None,
        "memory_bytes": parse_bytes(memory) if memory is not None else None,
        "threads": threads,
        "context_tokens": context,
        "concurrency": concurrency,
        "host": host,
        "port": port,
        "require_key": require_key or None,
        "allowed_hosts": (*base.allowed_hosts, *allow_hosts) if allow_hosts else None,
        "allowed_origins": (*base.allowed_origins, *allow_origins) if allow_origins else None,
        "wait_for_devices": wait_for,
        "quantize": quantize,
        "kv_cache": kv_cache,
        "prefix_cache": False if no_prefix_cache else None,
        "use_all_devices": use_all_devices,
        "objective": objective,
        "layers": layers,
        "fresh": fresh,
        "estimate": estimate,
        "measure_in_turn": measure_in_turn,
        "host_name": host_name,
        "lan_host": lan_host,
        "lan_port": lan_port,
        "lan": False if no_lan else True if lan_host is not None else None,
        "discovery": False if no_discovery else None,
        "approve_all": approve_all,
    }
    return validated(replace(base, **{key: value for key, value in overrides.items() if value is not None}))  # type: ignore[arg-type]


def _existing_file(path: Path) -> Path:
    if not path.exists():
        raise typer.BadParameter(f"there is no file {path}", param_hint="--config")
    return path
