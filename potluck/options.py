"""Command-line options that several commands share, and how they go on top of the config file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from potluck.config import Settings, checked, load_settings, parse_bytes
from potluck.paths import config_file

# The API's own default is 1, as OpenAI documents it; a small model rambles there.
DEFAULT_TEMPERATURE = 0.7

DeviceOption = Annotated[
    list[str] | None,
    typer.Option("--device", help="A device to use, such as torch:cpu, cuda:0, mps or mlx; repeat it. Default: all."),
]
MemoryOption = Annotated[str | None, typer.Option("--memory", help='Most memory a device gives, such as "8GiB".')]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="CPU threads a device gives.")]
ContextOption = Annotated[
    int | None, typer.Option("--context", help="Tokens of context. Default: 4096, or the model's if less.")
]
ConcurrencyOption = Annotated[
    int | None, typer.Option("--concurrency", help="Chats of full context that KV memory is reserved for.")
]
PortOption = Annotated[int | None, typer.Option("--port", help="The endpoint's port; 0 for any free one.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Settings file (TOML).")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts as JSON on stdout.")]


def settings_with(
    config: Path | None = None,
    *,
    model: str | None = None,
    devices: list[str] | None = None,
    memory: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    concurrency: int | None = None,
    port: int | None = None,
    wait_for: int | None = None,
    use_all_devices: bool | None = None,
) -> Settings:
    """The config file's settings with what the command line says on top. Raises ConfigError."""
    base = load_settings(config_file() if config is None else _existing(config))
    said = {
        "model": model,
        "devices": tuple(devices) if devices else None,
        "memory_bytes": parse_bytes(memory) if memory is not None else None,
        "threads": threads,
        "context_tokens": context,
        "concurrency": concurrency,
        "port": port,
        "wait_for_devices": wait_for,
        "use_all_devices": use_all_devices,
    }
    return checked(replace(base, **{key: value for key, value in said.items() if value is not None}))  # type: ignore[arg-type]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise typer.BadParameter(f"there is no file {path}", param_hint="--config")
    return path
