"""A model that others open from pieces: whatever its files, they read from it what its owner reads."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard.formats import weight_folder
from shard.formats.gguf.index import INDEX_FILE
from shard.formats.weight_folder import PlainFolder
from shard.pieces.cut_files import make_piece_list
from shard.pieces.metadata import LIST_FILE, read_complete_list, read_list, share_model, write_metadata_from_store
from shard.pieces.open import PieceFolder, _is_cached, _to_page_cache, open_checkpoint
from shard.pieces.piece_list import decode_piece_list, encode_piece_list, engine_pieces, list_digest, metadata_pieces
from tests.support.shard.model_pieces import ingested, pieced, stored
from tests.support.shard.tiny import save_tiny
from tests.support.shard.tiny_gguf import write_gguf
from transport.errors import BadCheckpoint, BadMessage
from transport.messages.pieces import Piece, PieceList
from transport.pieces.store import PieceStore


def model_of(kind: str, folder: Path) -> Path:
    if kind == "safetensors":
        return save_tiny("llama", 0, folder / "model")
    write_gguf(folder / "one.gguf")
    return ingested(folder / "one.gguf", folder / "model")


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_pieces_read_as_the_files_do(kind: str, tmp_path: Path) -> None:
    folder = model_of(kind, tmp_path)
    _, skeleton, store = pieced(folder, tmp_path / "scratch")
    plain, shared = open_checkpoint(folder), open_checkpoint(skeleton, pieces=store)
    assert (plain.spec, plain.config, plain.tensors) == (shared.spec, shared.config, shared.tensors)
    for name, info in plain.tensors.items():
        read = [np.empty(info.shape, np.float32) for _ in range(2)]
        plain.read_into(name, read[0], "float32")
        shared.read_into(name, read[1], "float32")
        np.testing.assert_array_equal(*read)
    assert sum(file.stat().st_size for file in skeleton.iterdir()) < plain.spec.file_bytes / 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PieceList, PieceStore]:
    folder = save_tiny("llama", 0, tmp_path_factory.mktemp("model"))
    pieces = make_piece_list(folder, "tiny")
    return folder, pieces, stored(folder, tmp_path_factory.mktemp("store"), pieces)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_of_a_file_comes_from_its_pieces(
    data: st.DataObject, whole: tuple[Path, PieceList, PieceStore]
) -> None:
    folder, pieces, store = whole
    file = next(file for file in pieces.files if file.name.endswith(".safetensors"))
    begin = data.draw(st.integers(file.pieces[1].offset, file.num_bytes - 1))  # The header is not read like this.
    out = np.zeros(data.draw(st.integers(1, file.num_bytes - begin)), np.uint8)
    wanted = out.copy()
    PieceFolder(folder, pieces, store).read(file.name, out, begin, "it")
    PlainFolder(folder).read(file.name, wanted, begin, "it")
    np.testing.assert_array_equal(out, wanted)
    with pytest.raises(BadCheckpoint, match="no piece"):
        PieceFolder(folder, pieces, store).read(file.name, np.zeros(2, np.uint8), file.num_bytes - 1, "it")


def test_a_piece_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = model_of("safetensors", tmp_path)
    pieces, skeleton, store = pieced(folder, tmp_path / "scratch")
    (norm,) = [piece for file in pieces.files for piece in file.pieces if piece.tensor == "model.norm.weight"]
    store.path(norm.digest).write_bytes(b"short")
    with pytest.raises(BadCheckpoint, match="has 5 bytes"):
        open_checkpoint(skeleton, pieces=store).read_into("model.norm.weight", np.empty(64, np.float32), "float32")


def test_a_piece_that_lacks_is_asked_for(tmp_path: Path) -> None:
    folder = model_of("safetensors", tmp_path)
    pieces, skeleton, store = pieced(folder, tmp_path / "scratch")
    full = stored(folder, tmp_path / "full", pieces)
    (norm,) = [piece for file in pieces.files for piece in file.pieces if piece.tensor == "model.norm.weight"]
    store.path(norm.digest).unlink()
    asked: list[Piece] = []

    def fetch(piece: Piece) -> None:
        asked.append(piece)
        store.put(full.path(piece.digest).read_bytes(), piece.digest)

    out, wanted = np.empty(64, np.float32), np.empty(64, np.float32)
    open_checkpoint(skeleton, pieces=store, fetch=fetch).read_into("model.norm.weight", out, "float32")
    open_checkpoint(folder).read_into("model.norm.weight", wanted, "float32")
    np.testing.assert_array_equal(out, wanted)
    assert asked == [Piece(norm.digest, norm.num_bytes)]


def test_the_pieces_that_follow_are_looked_for_while_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard.pieces.open._CAN_READ_AHEAD", True)
    asked: list[Path] = []
    going_on = threading.Event()

    def read_ahead(paths: Sequence[Path]) -> None:
        going_on.wait(10.0)
        asked.extend(paths)

    monkeypatch.setattr("shard.pieces.open._to_page_cache", read_ahead)
    pieces, skeleton, store = pieced(save_tiny("llama", 0, tmp_path / "model"), tmp_path)
    (weights,) = [file for file in pieces.files if file.name.endswith(".safetensors")]
    named = [piece for piece in weights.pieces if piece.tensor]
    folder = PieceFolder(skeleton, pieces, store)
    for piece in named[:3]:
        folder.read(weights.name, np.empty(piece.num_bytes, np.uint8), piece.offset, "a tensor")
    assert not asked, "reading does not wait for it"
    going_on.set()
    folder.close()
    assert asked == [store.path(piece.digest) for piece in named[1:]], "each once"
    folder.read(weights.name, np.empty(named[1].num_bytes, np.uint8), named[1].offset, "the second, once it is closed")


@pytest.mark.skipif(sys.platform != "linux", reason="others can't")
def test_reading_ahead_passes_over_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(bytes(100_000))
    _to_page_cache([tmp_path / "gone", tmp_path, tmp_path / "here"])


@pytest.mark.skipif(sys.platform != "linux", reason="others can't")
def test_only_what_the_system_does_not_have_in_memory_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send, here = os.sendfile, threading.get_ident()

    def noting(*arguments: Any) -> int:
        num_bytes = send(*arguments)
        if threading.get_ident() == here:
            sent.append(num_bytes)
        return num_bytes

    monkeypatch.setattr(os, "sendfile", noting)
    path, another = tmp_path / "piece", tmp_path / "another"
    for each in (path, another):
        each.write_bytes(bytes(1_000_000))
    _to_page_cache([path])
    assert not sent
    for each in (path, another):
        with each.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # To ask begins to read: not of the same one.
    with another.open("rb") as file:
        if _is_cached(file.fileno()):
            pytest.skip("a file system that is all in memory")
    _to_page_cache([path])
    assert sum(sent) == 1_000_000
    with path.open("rb") as file:
        assert _is_cached(file.fileno())


def test_many_threads_read_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_of("safetensors", tmp_path)
    _, skeleton, store = pieced(folder, tmp_path / "scratch")
    plain, shared = open_checkpoint(folder), open_checkpoint(skeleton, pieces=store)
    wanted = {name: np.empty(info.shape, np.float32) for name, info in plain.tensors.items()}
    for name, out in wanted.items():
        plain.read_into(name, out, "float32")
    open_now, most, lock = 0, 0, threading.Lock()
    really_open, really_close = os.open, os.close

    def counted_open(path: object, *arguments: int) -> int:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        return really_open(path, *arguments)  # type: ignore[arg-type]

    def counted_close(fd: int) -> None:
        nonlocal open_now
        with lock:
            open_now -= 1
        really_close(fd)

    monkeypatch.setattr(os, "open", counted_open)
    monkeypatch.setattr(os, "close", counted_close)
    wrong: list[str] = []

    def read(seed: int) -> None:
        for name in np.random.default_rng(seed).permutation(list(wanted)).tolist():
            out = np.empty_like(wanted[name])
            shared.read_into(name, out, "float32")
            if not np.array_equal(out, wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < most <= weight_folder.MAX_OPEN_DESCRIPTORS + len(threads)
    shared.close()
    assert open_now == 0


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_an_offer_is_made_once_and_anew_when_a_file_changes(kind: str, tmp_path: Path) -> None:
    folder = model_of(kind, tmp_path)
    told: list[int] = []

    def offer(model: str = "tiny") -> str:
        told.clear()
        made = share_model(folder, model, tmp_path / "shared", lambda done, total: told.append(done))
        assert list_digest(made.list_file.read_bytes()) == made.digest == list_digest(encode_piece_list(made.pieces))
        named = {file.name for file in made.pieces.files if any(piece.tensor for piece in file.pieces)}
        assert set(made.weight_stamps) == named
        for file in made.pieces.files:
            where = made.metadata if file.name in made.metadata_stamps else made.weights
            assert (where / file.name).stat().st_size == file.num_bytes
        return made.digest

    first = offer()
    assert told
    assert offer() == first
    assert not told, "nothing is hashed twice"
    assert offer("other") != first
    (tmp_path / "shared" / first / LIST_FILE).unlink()
    assert offer() == first
    file = tmp_path / "one.gguf" if kind == "gguf" else folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert offer() != first


def test_materialize_is_done_once_and_takes_nothing_on_trust(tmp_path: Path) -> None:
    folder = model_of("safetensors", tmp_path)
    pieces, skeleton, store = pieced(folder, tmp_path / "scratch")
    before = {path.name: path.read_bytes() for path in skeleton.iterdir()}
    assert read_list(skeleton) == pieces
    write_metadata_from_store(pieces, PieceStore(tmp_path / "empty"), skeleton)
    assert {path.name: path.read_bytes() for path in skeleton.iterdir()} == before
    with pytest.raises(BadCheckpoint, match="not on this host"):
        write_metadata_from_store(pieces, PieceStore(tmp_path / "empty"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".new")]
    headless = json.loads(encode_piece_list(pieces))
    for file in headless["files"]:
        if file["name"].endswith(".safetensors"):
            file["pieces"] = [piece for piece in file["pieces"] if piece[0]]
    with pytest.raises(BadMessage, match="header"):
        write_metadata_from_store(decode_piece_list(json.dumps(headless).encode()), store, tmp_path / "new")
    (skeleton / LIST_FILE).write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"pieces\.json"):
        open_checkpoint(skeleton, pieces=store)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "Q9_9"},
        {"shape": [1 << 40, 64]},
        {"shape": []},
        {"shape": [0, 64]},
        {"shape": [-64, -64]},
        {"offset": -1},
        {"offset": 1 << 50},
        {"file_bytes": 4},
        {"rotary_heads": 0},
        {"rotary_heads": 7},
    ],
)
def test_an_index_of_another_host_is_checked(change: dict[str, object], tmp_path: Path) -> None:
    folder = model_of("gguf", tmp_path)
    index = json.loads((folder / INDEX_FILE).read_bytes())
    tensor = next(one for one in index["tensors"] if one["name"].endswith("0.self_attn.q_proj.weight"))
    tensor |= change
    (folder / INDEX_FILE).write_bytes(msgspec.json.encode(index))
    with pytest.raises(BadCheckpoint, match="index"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_only_the_engines_host_gets_what_the_engine_reads(kind: str, tmp_path: Path) -> None:
    folder = model_of(kind, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    pieces = make_piece_list(folder, "tiny")
    engines = {file.name for file in pieces.files if file.reader == "engine"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= engines
    for_stages = stored(folder, tmp_path / "some", pieces, metadata_pieces(pieces).values())
    write_metadata_from_store(pieces, for_stages, tmp_path / "stages")
    assert not engines & {path.name for path in (tmp_path / "stages").iterdir()}
    digest = list_digest(encode_piece_list(pieces))
    assert read_complete_list(tmp_path / "stages", digest) == pieces
    assert read_complete_list(tmp_path / "stages", digest, for_engine=True) is None
    with pytest.raises(BadCheckpoint):
        write_metadata_from_store(pieces, for_stages, tmp_path / "stages", for_engine=True)
    # What stages have is kept, and completed.
    store = stored(
        folder, tmp_path / "more", pieces, [*metadata_pieces(pieces).values(), *engine_pieces(pieces).values()]
    )
    write_metadata_from_store(pieces, store, tmp_path / "stages", for_engine=True)
    assert read_complete_list(tmp_path / "stages", digest, for_engine=True) == pieces
    for name in engines:
        assert (tmp_path / "stages" / name).read_bytes() == (folder / name).read_bytes()
