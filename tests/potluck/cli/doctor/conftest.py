"""A host of its own to look at, and a head near it on the loopback address."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.doctor.small_head import SmallHead


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name: sockets' paths are short."""
    path = Path(tempfile.mkdtemp(prefix="plt-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The POTLUCK_HOME of this host, where nothing is yet."""
    for variable, name in (("POTLUCK_HOME", "home"), ("POTLUCK_RUNTIME", "run")):
        (folder / name).mkdir()
        monkeypatch.setenv(variable, str(folder / name))
    monkeypatch.setenv("POTLUCK_CONFIG", str(folder / "config.toml"))
    monkeypatch.setattr("potluck.cli.doctor.command.active_firewalls", lambda: ("ufw",))
    return folder / "home"


@pytest.fixture
def head(folder: Path, home: Path) -> Iterator[SmallHead]:
    """Of another home; `home` must be paired with it to be let in."""
    small = SmallHead(folder / "alpha", "127.0.0.1")
    yield small
    small.close()
