"""`potluck cache` as a user runs it: what is there, what it may take, and that only unneeded pieces are removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from potluck.cli.app import app_for
from potluck.system.paths import pieces_dir, shared_dir
from shard.pieces.cut_files import make_piece_list
from shard.pieces.metadata import share_model, write_metadata_from_store
from shard.pieces.open import open_checkpoint
from shard.pieces.piece_list import encode_piece_list, list_digest, stage_pieces
from tests.support.shard.model_pieces import contents
from tests.support.shard.tiny import save_tiny
from transport.errors import ConfigError
from transport.messages.pieces import Piece
from transport.pieces.store import PieceStore


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    return tmp_path


def potluck(*arguments: str) -> Result:
    return CliRunner().invoke(app_for([]), ["cache", *arguments])


def told(*arguments: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(potluck(*arguments, "--json").stdout)
    return found


def keep_half(folder: Path) -> list[Piece]:
    """The first two layers' pieces of the model in `folder`, as a worker has got them."""
    pieces = make_piece_list(folder, "tiny")
    needed = stage_pieces(pieces, open_checkpoint(folder).spec, 0, 2)
    store, found = PieceStore(pieces_dir()), contents(folder, pieces)
    for piece in needed.values():
        store.put(found[piece.digest], piece.digest)
    write_metadata_from_store(pieces, store, shared_dir() / list_digest(encode_piece_list(pieces)))
    return list(needed.values())


def test_an_empty_cache_is_no_error(home: Path) -> None:
    shown = potluck()
    assert shown.exit_code == 0
    assert "0 MiB" in shown.stdout
    assert "no limit" in shown.stdout
    assert told()["models"] == []
    assert told("clear") == {"freed_bytes": 0, "kept_bytes": 0}
    assert not (home / "home").exists()


def test_it_shows_what_is_there_and_removes_what_nobody_needs(home: Path) -> None:
    folder = save_tiny("llama", 0, home / "model")
    pieces = keep_half(folder)
    held = sum(piece.num_bytes for piece in pieces)
    report = told()
    assert report["used_bytes"] == held
    assert isinstance(report["models"], list)
    (model,) = report["models"]
    assert (model["name"], model["held_bytes"]) == ("tiny", held)
    assert held < model["total_bytes"] < 3 * held
    assert "tiny" in potluck().stdout
    with PieceStore(pieces_dir()).lease(pieces[:3]):
        kept = sum(piece.num_bytes for piece in pieces[:3])
        assert told("clear") == {"freed_bytes": held - kept, "kept_bytes": kept}
        assert [model["held_bytes"] for model in told()["models"]] == [kept]  # type: ignore[attr-defined]
    assert told("clear") == {"freed_bytes": kept, "kept_bytes": 0}
    assert not list(shared_dir().iterdir())


def test_a_model_that_this_host_offers_is_not_forgotten(home: Path) -> None:
    folder = save_tiny("llama", 0, home / "model")
    offered = share_model(folder, "tiny", shared_dir())
    assert told()["models"] == []
    assert told("clear") == {"freed_bytes": 0, "kept_bytes": 0}
    assert offered.list_file.is_file()


def test_a_limit_is_kept_and_holds_at_once(home: Path) -> None:
    pieces = keep_half(save_tiny("llama", 0, home / "model"))
    assert potluck("--limit", "100KB").exit_code == 0
    report = told()
    assert report["limit_bytes"] == 100_000
    assert 0 < PieceStore(pieces_dir()).used_bytes() <= 100_000 < sum(piece.num_bytes for piece in pieces)
    assert told("--limit", "none")["limit_bytes"] is None
    for wrong in ("0", "lots"):
        failed = potluck("--limit", wrong)
        assert isinstance(failed.exception, ConfigError)
        assert failed.exception.hint
