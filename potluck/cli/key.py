"""`potluck key` shows the API key, or makes a new one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from potluck.api.api_key import make_key, read_key
from potluck.cli.options import JsonOption
from potluck.cli.terminal import stderr, stdout
from transport.errors import NotRunning


def key(
    new: Annotated[
        bool, typer.Option("--new", help="Make a new one; who has only the old one is out within a second.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Show the API key that the endpoint takes where it needs one."""
    found = make_key() if new else read_key()
    if found is None:
        raise NotRunning("there is no API key yet", hint="make one: potluck key --new, or potluck up --host 0.0.0.0")
    if json_output:
        stdout.file.write(json.dumps({"key": found, "is_new": new}) + "\n")
        return
    stdout.file.write(f"{found}\n")
    if new:
        stderr.print("Running heads take it from now on, and no longer the one before.")
