"""Settings are one frozen dataclass, read from a TOML file; the command line overrides them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args, get_type_hints

from planner.options import STRATEGIES, parse_layers
from transport.errors import ConfigError
from transport.messages.ring import KVForm

DEFAULT_PORT = 11500
DEFAULT_CONTEXT_TOKENS = 4096
QUANTIZE = ("stored", "dense", "8", "4", "auto")
KV_CACHE: tuple[KVForm, ...] = get_args(KVForm)

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `potluck up` needs to know. `devices` empty means: what this host has.

    The endpoint listens on `host`; unless that is a loopback address it needs an API key, which `require_key` also asks
    for. `allowed_hosts` are more names it answers to, `allowed_origins` pages elsewhere that may ask it.
    `offline`: models come from this host and the pool, never from a hub or a package index.
    `memory_bytes` caps what each device of this host gives; None leaves it to what is free. `threads` are those that
    the workers on its CPU have together; None is its physical cores.
    Unless `lan` is off, other hosts can pair and join: `lan_host` is where they reach this one (None: found out),
    `lan_port` where they knock at the head's door (None: 11501, or any if that is taken; 0: any), `discovery` whether
    they find it by themselves, `approve_all` whether those that know the code need no further approval. `host_name`
    None is the system's.
    `context_tokens` None is 4,096 or the model's context if that is less.
    `quantize` is how stages hold matrices: as "stored", "dense", what is dense quantized to "8" or "4" bits, or "auto".
    `kv_cache` is how they hold KV: "full", in what they compute in, or "8-bit". `prefix_cache` keeps the KV of what is
    over, for prompts that begin alike.
    `objective` is what plans are best at; `layers` says them by hand ("mac=20,gpu=12").
    `fresh` measures devices and links again; `measure_in_turn` one device at a time, for hosts that share a machine.
    `estimate` plans from bandwidths instead, which takes no time and says less.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    require_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    model: str | None = None
    offline: bool = False
    devices: tuple[str, ...] = ()
    memory_bytes: int | None = None
    threads: int | None = None
    context_tokens: int | None = None
    concurrency: int = 4
    quantize: str = "stored"
    kv_cache: str = "full"
    prefix_cache: bool = True
    use_all_devices: bool = False
    objective: str = "auto"
    layers: str | None = None
    fresh: bool = False
    estimate: bool = False
    measure_in_turn: bool = False
    wait_for_devices: int = 0
    host_name: str | None = None
    lan_host: str | None = None
    lan_port: int | None = None
    lan: bool = True
    discovery: bool = True
    approve_all: bool = False


def load_settings(path: Path) -> Settings:
    """Settings of a TOML file; defaults if there is none. Raises ConfigError for an unknown key or a wrong type."""
    if not path.exists():
        return Settings()
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}", hint="it must be a TOML file") from error
    return parse_settings(data, where=str(path))


def parse_settings(data: dict[str, Any], *, where: str) -> Settings:
    known = {field.name for field in fields(Settings)}
    renamed = {("memory_bytes" if key == "memory" else key): value for key, value in data.items()}
    unknown = sorted(set(renamed) - known)
    if unknown:
        keys = ", ".join(sorted(known - {"memory_bytes"} | {"memory"}))
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}", hint=f"the keys are: {keys}")
    if isinstance(renamed.get("memory_bytes"), str):
        renamed["memory_bytes"] = parse_bytes(renamed["memory_bytes"])
    for key in ("devices", "allowed_hosts", "allowed_origins"):
        if isinstance(renamed.get(key), list):
            renamed[key] = tuple(renamed[key])
    _check_types(renamed, where)
    return validated(replace(Settings(), **renamed))


def validated(settings: Settings) -> Settings:
    """The same settings. Raises ConfigError for a value that can't work."""
    for port in (settings.port, settings.lan_port or 0):
        if not 0 <= port <= 65535:
            raise ConfigError(f"port {port} does not exist", hint="choose one from 1 to 65535, or 0 for any")
    if settings.host_name is not None and (not settings.host_name.strip() or "/" in settings.host_name):
        raise ConfigError(f"{settings.host_name!r} is no name for a host", hint="choose one without a slash")
    if settings.host != "localhost" and not _is_address(settings.host):
        raise ConfigError(
            f"the endpoint can't listen on {settings.host!r}: that is no address",
            hint="use 127.0.0.1, an address of this host, or 0.0.0.0 for all of them",
        )
    if settings.objective not in STRATEGIES:
        raise ConfigError(f"objective {settings.objective!r} is unknown", hint=f"it is one of: {', '.join(STRATEGIES)}")
    if settings.quantize not in QUANTIZE:
        raise ConfigError(f"quantize {settings.quantize!r} is unknown", hint=f"it is one of: {', '.join(QUANTIZE)}")
    if settings.kv_cache not in KV_CACHE:
        raise ConfigError(f"kv_cache {settings.kv_cache!r} is unknown", hint=f"it is one of: {', '.join(KV_CACHE)}")
    if settings.layers is not None:
        parse_layers(settings.layers)
    for name, value in (
        ("threads", settings.threads),
        ("memory", settings.memory_bytes),
        ("context", settings.context_tokens),
        ("concurrency", settings.concurrency),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1", hint=f"leave {name} out for the default")
    return settings


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def parse_bytes(text: str) -> int:
    """ "8GiB", "500 MB" or "1073741824" in bytes. Raises ConfigError."""
    number = text.strip().lower()
    unit = number.lstrip("0123456789. ")
    digits = number[: len(number) - len(unit)].strip()
    try:
        return int(float(digits) * _UNITS[unit if unit != "g" else "gib"])
    except (KeyError, ValueError, OverflowError) as error:
        raise ConfigError(f"{text!r} is not an amount of memory", hint='write it as "8GiB" or "500MB"') from error


def _check_types(data: dict[str, Any], where: str) -> None:
    hints = get_type_hints(Settings)
    for key, value in data.items():
        expected = hints[key]
        accepted: tuple[type, ...] = {
            str: (str,),
            int: (int,),
            bool: (bool,),
            tuple[str, ...]: (tuple,),
        }.get(expected, (int,) if "int" in str(expected) else (str,))
        wrong = not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted)
        if wrong or (isinstance(value, tuple) and not all(isinstance(item, str) for item in value)):
            raise ConfigError(
                f"{where}: {key} = {value!r} has the wrong type", hint=f"it must be {_type_name(accepted)}"
            )


def _type_name(accepted: tuple[type, ...]) -> str:
    return {str: "a text", int: "a whole number", bool: "true or false", tuple: "a list of texts"}[accepted[0]]
