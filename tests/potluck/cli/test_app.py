"""Which commands there are, and that none waits for what others import."""

from __future__ import annotations

import subprocess
import sys

import typer
from typer.main import get_command

from potluck.cli.app import COMMANDS, app_for


def commands_of(app: typer.Typer) -> list[str]:
    return list(get_command(app).commands)  # type: ignore[attr-defined]


def test_every_command_of_the_table_is_there() -> None:
    for command in COMMANDS:
        # One command alone is the whole program to Typer unless it has a callback, which it has.
        assert commands_of(app_for([command, "--help"])) == [command]
    every = sorted(COMMANDS)
    for none in ([], ["--help"], ["--version"], ["no-such-command"]):
        assert sorted(commands_of(app_for(none))) == every


def test_a_command_imports_only_its_own() -> None:
    code = "import sys; from potluck.cli.app import app_for; app_for(['status']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "potluck.cli.status" in loaded
    assert not loaded & {"potluck.cli.up", "potluck.head.head", "potluck.store.store", "numpy", "gguf"}
