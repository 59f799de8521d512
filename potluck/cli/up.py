"""`potluck up` serves a model over this host's devices and those that join."""

from __future__ import annotations

import json

import msgspec

from potluck.cli.options import JsonOption, with_settings
from potluck.cli.session import running_head_of
from potluck.cli.status import show_stages
from potluck.cli.terminal import show_line, stderr, stdout
from potluck.system.settings import SETTINGS, Settings


@with_settings(*SETTINGS)
def up(settings: Settings, json_output: JsonOption = False) -> None:
    """Serve MODEL at an OpenAI-compatible endpoint until Ctrl-C."""
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
