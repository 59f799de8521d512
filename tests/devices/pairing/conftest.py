"""A pairing server as it is, one that soon loses patience, and one that never does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devices.pairing_head import House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "roster.json")
    yield made
    made.door.close()


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr("devices.pairing.server.PAIRING_SERVER_LINE_S", 2.0)
    made = House(tmp_path / "roster.json")
    yield made
    made.door.close()


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr("devices.pairing.server.PAIRING_SERVER_LINE_S", 600.0)
    made = House(tmp_path / "roster.json")
    yield made
    made.door.close()
