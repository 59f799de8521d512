"""`potluck config` shows which settings hold here, and where each comes from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from potluck.cli.options import ConfigOption, JsonOption, given_settings
from potluck.cli.terminal import show_line, show_table, stdout
from potluck.system.paths import config_file, home_dir, runtime_path
from potluck.system.settings import SETTINGS, GivenValue, Setting
from transport.errors import ConfigError

_VARIABLES = ("POTLUCK_HOME", "POTLUCK_CONFIG", "POTLUCK_RUNTIME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")


def config(
    name: Annotated[str | None, typer.Argument(help="One setting, by its name.")] = None,
    template: Annotated[
        bool, typer.Option("--template", help="Print a settings file with every setting, each commented out.")
    ] = False,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the settings that hold on this host, and where each comes from: its default or the settings file.

    The options of a command go before both.
    """
    if template:
        stdout.file.write(settings_template())
        return
    given = given_settings(config, {})
    names = list(SETTINGS) if name is None else [_known(name)]
    if json_output:
        stdout.file.write(json.dumps(_facts(names, given, config or config_file())) + "\n")
    elif name is not None:
        _show_one(SETTINGS[names[0]], given)
    else:
        _show_all(given, config or config_file())


def settings_template() -> str:
    """A settings file that says each setting's help, and how it is written."""
    blocks = []
    for setting in SETTINGS.values():
        example = setting.default if setting.example is None else setting.example
        default = "" if setting.example is None or not setting.unset else f" Default: {setting.unset}."
        blocks.append(f"# {setting.help}{default}\n# {setting.name} = {setting.text(example)}\n")
    return "\n".join(blocks)


def _known(name: str) -> str:
    plain = name.removeprefix("--").replace("-", "_")
    for setting in SETTINGS.values():
        if plain in (setting.name, *setting.former):
            return setting.name
    raise ConfigError(f"expected a setting, got {name!r}", hint=f"the settings are: {', '.join(SETTINGS)}")


def _value(setting: Setting, given: Mapping[str, GivenValue]) -> str:
    if setting.name not in given:
        return setting.default_text or "–"
    return setting.text(given[setting.name].value)


def _source(setting: Setting, given: Mapping[str, GivenValue]) -> str:
    if setting.name not in given:
        return "default"
    key = given[setting.name].said_as
    return "file" if key == setting.name else f"file, as {key}"


def _show_all(given: Mapping[str, GivenValue], file: Path) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "setting")
    for setting in SETTINGS.values():
        table.add_row(setting.name, escape(_value(setting, given)), _source(setting, given))
    show_table(stdout, table)
    missing = "" if file.exists() else " (not there; potluck config --template prints one to begin with)"
    stdout.print()
    show_line(stdout, f"Settings file: {file}{missing}", markup=False)
    show_line(stdout, f"Models and logs: {home_dir()}", markup=False)
    show_line(stdout, f"Sockets: {runtime_path()}", markup=False)
    for variable, value in _environment().items():
        show_line(stdout, f"{variable}={value}", markup=False)


def _show_one(setting: Setting, given: Mapping[str, GivenValue]) -> None:
    lines = [
        f"{setting.name} = {_value(setting, given)} ({_source(setting, given)})",
        setting.help,
        f"Expected: {setting.expected}. Default: {setting.default_text or 'none'}.",
        f"Option: {', '.join(setting.options)}",
    ]
    for line in lines:
        show_line(stdout, line, markup=False)


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def _facts(names: list[str], given: Mapping[str, GivenValue], file: Path) -> dict[str, Any]:
    settings = {}
    for name in names:
        setting = SETTINGS[name]
        value = given[name].value if name in given else setting.default
        settings[name] = {"value": value, "from": _source(setting, given)}
    folders = {"home": str(home_dir()), "runtime": str(runtime_path())}
    return {
        "file": str(file),
        "is_there": file.exists(),
        "settings": settings,
        "folders": folders,
        "environment": _environment(),
    }
