"""Options of the commands: those of the settings are made from their definitions, the others are here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from potluck.system.paths import config_file
from potluck.system.settings import SETTINGS, GivenValue, Kind, Setting, given_values, settings_of

# The API's own default is 1, as OpenAI documents it; a small model rambles there.
DEFAULT_TEMPERATURE = 0.7

ConfigOption = Annotated[Path | None, typer.Option("--config", help="Settings file (TOML).")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts as JSON on stdout.")]

_OPTION_TYPES: dict[Kind, Any] = {"text": str, "number": int, "switch": bool, "bytes": str, "texts": list[str]}


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of these settings and --config. It is called with `settings`: the file's, with what
    the command line says on top; and with `given`, what these say, where it has that parameter."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        hints = get_type_hints(command, include_extras=True)

        def run(*, config: Path | None = None, **arguments: Any) -> None:
            said = {name: arguments.pop(name, None) for name in names}
            given = given_settings(config, said)
            extra = {"given": given} if "given" in own else {}
            command(settings=settings_of(given), **extra, **arguments)

        kept = [each.replace(kind=each.KEYWORD_ONLY, annotation=hints[name]) for name, each in own.items()]
        made = [_parameter(SETTINGS[name]) for name in names]
        made.append(_keyword("config", ConfigOption))
        at = next(i for i, each in enumerate(kept) if each.name == "settings")
        parameters = [each for each in (*kept[:at], *made, *kept[at:]) if each.name not in ("settings", "given")]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def given_settings(config: Path | None, said: Mapping[str, Any]) -> dict[str, GivenValue]:
    """What the settings file says, and the command line on top of it. Raises ConfigError."""
    if config is not None and not config.exists():
        raise typer.BadParameter(f"there is no file {config}", param_hint="--config")
    return given_values(config_file() if config is None else config, said)


def _parameter(setting: Setting) -> inspect.Parameter:
    """None is what the command line does not say."""
    repeat = " Repeat it for more." if setting.kind == "texts" else ""
    if setting.name == "model":
        info: Any = typer.Argument(help=setting.help)
    else:
        default = f" Default: {setting.default_text.strip(chr(34))}." if setting.default_text else ""
        info = typer.Option(*setting.options, help=f"{setting.help}{repeat}{default}")
    return _keyword(setting.name, Annotated[_OPTION_TYPES[setting.kind] | None, info])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
