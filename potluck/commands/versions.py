"""`potluck version`: which version this is, and those of what it stands on."""

from __future__ import annotations

import json

import typer

from potluck.options import JsonOption
from potluck.terminal import data
from potluck.versions import versions


def register(app: typer.Typer) -> None:
    app.command("version")(show_version)


def show_version(json_output: JsonOption = False) -> None:
    """Show which version this is, and those of Python and the libraries that it uses."""
    found = versions()
    if json_output:
        data.file.write(json.dumps(found) + "\n")
        return
    width = max(map(len, found))
    for name, value in found.items():
        data.print(f"{name:<{width}}  {_told(value)}", markup=False, highlight=False, soft_wrap=True)


def _told(value: str | int | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not installed" if value is None else str(value)
