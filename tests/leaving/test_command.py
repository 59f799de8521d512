"""`potluck uninstall`, `potluck service` and `potluck version` as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.known_pools import KnownPool, save_known_pool
from potluck.head_file import HeadFacts, HeadFile
from potluck.store import Store
from tests.shard.tiny_gguf import write_gguf

HAS_SYSTEMD = shutil.which("systemctl") is not None


class User:
    """Somebody with a home of his own, where nothing of Potluck's is yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / ".local" / "share" / "potluck"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("POTLUCK_", "XDG_", "HF_")) or name == "POTLUCK_TEST_HOME"
        } | {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder / "r"), "COLUMNS": "200"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "potluck.cli", *arguments]
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    def facts(self, *arguments: str) -> Any:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def user() -> Iterator[User]:
    with tempfile.TemporaryDirectory(prefix="pl-") as name:
        user = User(Path(name))
        write_gguf(user.folder / "tiny.gguf")
        Store(user.data).pull(str(user.folder / "tiny.gguf"))
        yield user


def test_it_says_what_there_is_asks_and_removes_it(user: User) -> None:
    unit = user.folder / ".config" / "systemd" / "user" / "potluck.service"
    installed = user.run("service", "install", "--model", "tiny", "--no-start")
    assert installed.returncode == (0 if HAS_SYSTEMD else 1), installed.stderr
    assert not HAS_SYSTEMD or 'up" "tiny"' in unit.read_text(encoding="utf-8")
    save_known_pool(user.data / "pools.json", KnownPool(pool="p", key="k" * 40, name="desk", my_name="my-laptop"))
    before = sorted(user.folder.rglob("*"))
    dry = user.facts("uninstall", "--dry-run", "--json")
    assert sorted(user.folder.rglob("*")) == before
    assert {kept["kind"] for kept in dry["kept"]} >= {"models", "locks", "pairing"} | (
        {"service"} if HAS_SYSTEMD else set()
    )
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


def test_it_refuses_while_a_head_runs(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_RUNTIME", str(user.folder / "r" / "potluck"))
    facts = HeadFacts(pid=os.getpid(), url="http://127.0.0.1:1", model="tiny", control="c", host="here")
    with HeadFile() as file:
        file.publish(facts)
        refused = user.run("uninstall", "--yes")
    assert refused.returncode == 1 and "already serves tiny" in refused.stderr
    assert (user.data / "models" / "tiny").exists()


def test_a_home_that_is_not_potlucks_alone_is_refused(user: User) -> None:
    user.environment["POTLUCK_HOME"] = "."  # The command runs in the user's home.
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


def test_what_a_terminal_can_not_say_is_no_crash(user: User) -> None:
    user.environment |= {"PYTHONIOENCODING": "latin-1"}
    done = user.run("show", "日本")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "hint" in done.stderr
