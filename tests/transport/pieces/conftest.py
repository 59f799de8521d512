"""An empty store of pieces, and a pool of hosts that have some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.transport.pieces_pool import Model, Pool
from transport.messages.pieces import MAX_PIECE_BYTES, PART_BYTES
from transport.pieces import fetch_peer, fetch_plan
from transport.pieces.store import PieceStore


@pytest.fixture
def store(tmp_path: Path) -> PieceStore:
    return PieceStore(tmp_path / "pieces")


@pytest.fixture(scope="module")
def large() -> Model:
    return Model(MAX_PIECE_BYTES, 100, 5_000_001, MAX_PIECE_BYTES, 8 * PART_BYTES, 3_000_000, seed=1)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool(tmp_path) as pool:
        yield pool


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up waiting for another one, or does its part, because a busy machine makes it slow."""
    for name in ("HINT_PATIENCE_S", "AWAY_PATIENCE_S", "ENDGAME_IDLE_S"):
        monkeypatch.setattr(fetch_plan, name, 120.0)
    for name in ("PEER_SILENT_S", "SLOW_AFTER_S"):
        monkeypatch.setattr(fetch_peer, name, 120.0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
