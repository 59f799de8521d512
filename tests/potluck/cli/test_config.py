"""Every option that names a setting is made from its definition, and `potluck config` shows what holds."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from potluck.cli.app import app_for
from potluck.cli.config import settings_template
from potluck.cli.options import with_settings
from potluck.system.settings import SETTINGS, Settings, parse_settings
from transport.errors import ConfigError

# These say something else: which model a service is to serve.
OTHERS = {("service install", "--model")}
WITH_SETTINGS = {"up", "join", "plan", "run", "demo", "doctor", "pull"}


def commands_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield " ".join(path), command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands_of(each, (*path, name))


COMMANDS = dict(commands_of(get_command(app_for([]))))


def test_options_that_name_a_setting_are_that_setting_s() -> None:
    seen: set[str] = set()
    for path, command in COMMANDS.items():
        for parameter in command.params:
            for option in parameter.opts:
                setting = SETTINGS.get(option.removeprefix("--").replace("-", "_"))
                if setting is None or (path, option) in OTHERS:
                    continue
                seen.add(setting.name)
                assert path in WITH_SETTINGS, path
                assert parameter.default is None, f"{path} {option} would always be said"
                assert parameter.help.startswith(setting.help) or setting.name == "model"
                assert bool(parameter.secondary_opts) == (setting.kind == "switch")
    assert seen >= set(SETTINGS) - {"model"}


def test_up_has_every_setting_and_its_options_of_before() -> None:
    spelled = {option for each in COMMANDS["up"].params for option in (*each.opts, *each.secondary_opts)}
    before = (
        "--device --memory --threads --context --concurrency --quantize --kv-cache --no-prefix-cache --host --port "
    )
    before += "--require-key --allow-host --allow-origin --use-all --objective --layers --fresh --estimate --offline "
    before += (
        "--measure-in-turn --wait-for --no-lan --no-discovery --yes --lan-host --lan-port --host-name --config --json"
    )
    assert spelled >= {*before.split(), *(setting.option for setting in SETTINGS.values() if setting.name != "model")}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "config.toml"
    monkeypatch.setenv("POTLUCK_CONFIG", str(found))
    return found


def test_a_command_gets_the_file_and_the_line_on_top(file: Path) -> None:
    got: list[tuple[Settings, dict[str, str]]] = []

    def command(settings: Settings, given: dict[str, Any], other: str = "x") -> None:
        """Try it."""
        got.append((settings, {name: each.said_as for name, each in given.items()}))

    app = typer.Typer()
    app.command()(with_settings("model", "memory", "lan", "allow_host", "offline")(command))
    file.write_text('context_tokens = 512\noffline = true\nallow_host = "a"\n', encoding="utf-8")
    arguments = ["tiny", "--memory", "1GiB", "--no-lan", "--allow-host", "b", "--no-offline", "--other", "y"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert got[0][0] == Settings(model="tiny", memory=2**30, lan=False, allow_host=("a", "b"), context=512)
    assert got[0][1]["context"] == "context_tokens" and got[0][1]["memory"] == "--memory"
    for wrong in ("8", "lots", str(2**30)):
        assert isinstance(CliRunner().invoke(app, ["--memory", wrong]).exception, ConfigError)
    assert CliRunner().invoke(app, ["--config", "/no/such/file"]).exit_code == 2


@pytest.mark.parametrize("path", sorted(WITH_SETTINGS))
def test_a_bad_file_is_refused_by_every_command_that_reads_it(path: str, file: Path) -> None:
    file.write_text("prot = 1\n", encoding="utf-8")
    needed = {"pull": ["smollm2"], "run": ["smollm2", "hello"]}.get(path, [])
    result = CliRunner().invoke(app_for([path]), [path, *needed])
    assert isinstance(result.exception, ConfigError) and "'port'" in result.exception.message


def test_a_service_is_not_installed_with_a_bad_file(file: Path) -> None:
    file.write_text("memory = 8\n", encoding="utf-8")
    result = CliRunner().invoke(app_for(["service"]), ["service", "install", "--model", "smollm2", "--dry-run"])
    assert isinstance(result.exception, ConfigError) and '"8GiB"' in result.exception.hint


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache", "--limit", "50"],
        ["plan", "smollm2", "--memory", "8"],
        ["join", "--memory", "8"],
        ["up", "smollm2", "--memory", "8"],
        ["run", "smollm2", "hello", "--memory", "8"],
    ],
)
def test_a_bare_number_of_bytes_is_refused_at_every_command(arguments: list[str], file: Path) -> None:
    result = CliRunner().invoke(app_for(arguments), arguments)
    assert isinstance(result.exception, ConfigError) and 'did you mean "' in result.exception.hint


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app_for(["config"]), ["config", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_config_shows_where_each_setting_comes_from(file: Path) -> None:
    file.write_text('context_tokens = 512\nmemory = "8GiB"\n', encoding="utf-8")
    facts = json.loads(said("--json"))
    assert set(facts["settings"]) == set(SETTINGS)
    assert facts["settings"]["context"] == {"value": 512, "from": "file, as context_tokens"}
    assert facts["settings"]["memory"] == {"value": 8 * 2**30, "from": "file"}
    assert facts["settings"]["port"] == {"value": 11500, "from": "default"}
    assert facts["file"] == str(file) and facts["is_there"] and facts["environment"]["POTLUCK_CONFIG"] == str(file)
    assert list(json.loads(said("--json", "allow-host"))["settings"]) == ["allow_host"]
    with pytest.raises(ConfigError, match="prot"):
        said("prot")


def test_the_template_loads_when_nothing_is_commented_out(file: Path) -> None:
    lines = [line.removeprefix("# ") for line in settings_template().splitlines()]
    keys = tomllib.loads("\n".join(line for line in lines if line.partition(" = ")[0] in SETTINGS))
    assert set(parse_settings(keys, where="template")) == set(SETTINGS)
    assert tomllib.loads(settings_template()) == {}
