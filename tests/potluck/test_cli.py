"""Which commands there are, and that none waits for what others import."""

from __future__ import annotations

import subprocess
import sys

import typer
from typer.main import get_command

from potluck.cli import MODULES, app_for


def commands_of(app: typer.Typer) -> list[str]:
    return list(get_command(app).commands)  # type: ignore[attr-defined]


def test_every_module_registers_what_the_table_says() -> None:
    for module, commands in MODULES.items():
        for command in commands:
            # One command alone is the whole program to Typer unless it has a callback, which it has.
            assert commands_of(app_for([command, "--help"])) == list(commands), module
    every = sorted(command for commands in MODULES.values() for command in commands)
    for none in ([], ["--help"], ["--version"], ["no-such-command"]):
        assert sorted(commands_of(app_for(none))) == every


def test_a_command_imports_only_its_own() -> None:
    code = "import sys; from potluck.cli import app_for; app_for(['status']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "potluck.commands.status" in loaded
    assert not loaded & {"potluck.commands.up", "potluck.head", "potluck.store.store", "numpy", "gguf"}
