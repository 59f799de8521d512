"""`potluck uninstall`, `potluck service` and `potluck version` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from devices.pairing.known_pools import KnownPool, save_known_pool
from potluck.cli.app import main
from potluck.cli.service.systemd import Systemd
from potluck.host.local_head import HeadFile, LocalHead
from potluck.store.store import Store
from tests.support.service.scripted_manager import Scripted
from tests.support.shard.tiny_gguf import write_gguf


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


class User:
    """Somebody with a home of his own, where nothing of Potluck's is yet."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.data = folder / ".local" / "share" / "potluck"
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        for name in list(os.environ):
            if name.startswith(("POTLUCK_", "XDG_")):
                monkeypatch.delenv(name)
        for name, value in (("HOME", folder), ("XDG_RUNTIME_DIR", folder / "r"), ("COLUMNS", "200")):
            monkeypatch.setenv(name, str(value))
        # Never the developer's own.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        for command in ("service", "uninstall"):
            monkeypatch.setattr(f"potluck.cli.{command}.command.service_manager", lambda: Systemd(Scripted()))
        monkeypatch.chdir(folder)

    def run(self, *arguments: str) -> Ended:
        """`potluck ARGUMENTS`, in this process: to start one takes longer than all that it does here."""
        self._monkeypatch.setattr(sys, "argv", ["potluck", *arguments])
        self._capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = self._capsys.readouterr()
        return Ended(returncode=code, stdout=said.out, stderr=said.err)

    def facts(self, *arguments: str) -> Any:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[User]:
    with tempfile.TemporaryDirectory(prefix="pl-") as name:  # A socket's path is short: pytest's own are not.
        user = User(Path(name), monkeypatch, capsys)
        write_gguf(user.folder / "tiny.gguf")
        Store(user.data).pull(str(user.folder / "tiny.gguf"))
        yield user
        monkeypatch.undo()


def test_it_says_what_there_is_asks_and_removes_it(user: User) -> None:
    unit = user.folder / ".config" / "systemd" / "user" / "potluck.service"
    assert user.run("service", "install", "--model", "tiny", "--no-start").returncode == 0
    assert 'up" "tiny"' in unit.read_text(encoding="utf-8")
    save_known_pool(user.data / "pools.json", KnownPool(pool="p", key="k" * 40, name="desk", my_name="my-laptop"))
    before = sorted(user.folder.rglob("*"))
    dry = user.facts("uninstall", "--dry-run", "--json")
    assert sorted(user.folder.rglob("*")) == before
    assert {kept["kind"] for kept in dry["kept"]} >= {"models", "locks", "pairing", "service"}
    assert dry["dry_run"] is True and dry["freed_bytes"] == 0

    unasked = user.run("uninstall")
    assert unasked.returncode == 1 and "--yes" in unasked.stderr and "models that were pulled" in unasked.stderr
    assert user.data.exists()

    first = user.run("uninstall", "--yes", "--keep-models")
    assert first.returncode == 0 and "potluck revoke my-laptop" in first.stdout
    assert (user.data / "models" / "tiny").exists() and not (user.data / "locks").exists()
    assert not unit.exists()

    done = user.run("uninstall", "--yes")
    assert done.returncode == 0, done.stderr
    assert "pip uninstall potluck" in done.stdout
    assert not user.data.exists() and not (user.folder / "r" / "potluck").exists()
    assert (user.folder / "tiny.gguf").exists()

    nothing = user.run("uninstall")  # Nobody is asked about nothing.
    assert nothing.returncode == 0 and "keeps nothing" in nothing.stderr


def test_it_refuses_while_a_head_runs(user: User) -> None:
    facts = LocalHead(pid=os.getpid(), url="http://127.0.0.1:1", model="tiny", control="c", host="here")
    with HeadFile() as file:
        file.publish(facts)
        refused = user.run("uninstall", "--yes")
    assert refused.returncode == 1 and "already serves tiny" in refused.stderr
    assert (user.data / "models" / "tiny").exists()


def test_a_home_that_is_not_potlucks_alone_is_refused(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_HOME", ".")  # The command runs in the user's home.
    refused = user.run("uninstall", "--yes")
    assert refused.returncode == 1 and "nothing is removed" in refused.stderr
    assert (user.data / "models" / "tiny").exists()


def test_a_service_is_shown_before_it_is_installed(user: User) -> None:
    shown = user.run("service", "install", "--join", "--dry-run")
    assert shown.returncode == 0 and "[Service]" in shown.stdout and '"join"' in shown.stdout
    assert user.facts("service", "status", "--json")["installed"] is False
    unpaired = user.run("service", "install", "--join")
    assert unpaired.returncode == 1 and "potluck join CODE" in unpaired.stderr
    assert not (user.folder / ".config").exists()


def test_versions(user: User) -> None:
    facts = user.facts("version", "--json")
    assert facts["potluck"] and facts["torch"] and facts["curve"] is True and isinstance(facts["protocol"], int)


def test_what_a_terminal_can_not_say_is_no_crash() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "potluck", "show", "日本"],
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "POTLUCK_HOME": "/nowhere"},
        capture_output=True,
        encoding="latin-1",
        timeout=400,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "hint" in done.stderr
