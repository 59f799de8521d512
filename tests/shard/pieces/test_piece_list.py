"""Piece lists: the same files give the same list, and whatever else another host sends is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from shard.pieces.cut_files import make_piece_list
from shard.pieces.piece_list import decode_piece_list, encode_piece_list
from tests.support.shard.model_pieces import contents, ingested
from tests.support.shard.tiny import save_tiny
from tests.support.shard.tiny_gguf import write_gguf
from transport.errors import BadCheckpoint, BadMessage
from transport.messages.pieces import LIST_VERSION, MAX_LIST_BYTES, MAX_PIECE_BYTES, ListedFile, PieceList, PlacedPiece

DIGEST = hashlib.sha256(b"x").hexdigest()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", 0, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def listed(tiny_folder: Path) -> PieceList:
    return make_piece_list(tiny_folder, "tiny")


def test_pieces_are_the_files_bytes_and_all_of_a_tensor(tiny_folder: Path, listed: PieceList) -> None:
    for digest, data in contents(tiny_folder, listed).items():
        assert hashlib.sha256(data).hexdigest() == digest
    held: dict[str, int] = {}
    for file in listed.files:
        for piece in file.pieces:
            held[piece.tensor] = held.get(piece.tensor, 0) + piece.num_bytes
    infos = SafetensorsCheckpoint(tiny_folder).tensors
    assert {name: info.file_bytes for name, info in infos.items()} == {k: v for k, v in held.items() if k}
    assert decode_piece_list(encode_piece_list(listed)) == listed


def test_the_same_file_elsewhere_has_the_same_list(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a" / "one.gguf")
    first = make_piece_list(ingested(tmp_path / "a" / "one.gguf", tmp_path / "first"), "tiny")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "one.gguf").rename(tmp_path / "b" / "one.gguf")
    (tmp_path / "b" / "one.gguf").touch()
    assert make_piece_list(ingested(tmp_path / "b" / "one.gguf", tmp_path / "second"), "tiny") == first


def test_large_tensors_are_cut_and_progress_ends_with_all(tmp_path: Path) -> None:
    folder = save_tiny("llama", 0, tmp_path / "model")
    arrays = load_file(folder / "model.safetensors")
    arrays["model.large"] = np.random.default_rng(0).standard_normal(MAX_PIECE_BYTES // 4 * 2 + 5).astype(np.float32)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    told: list[tuple[int, int]] = []
    pieces = make_piece_list(folder, "tiny", lambda done, total: told.append((done, total)))
    large = [piece.num_bytes for file in pieces.files for piece in file.pieces if piece.tensor == "model.large"]
    assert large == [MAX_PIECE_BYTES, MAX_PIECE_BYTES, 20]
    assert told == sorted(told)
    weights = (folder / "model.safetensors").stat().st_size
    assert told[-1] == (weights, weights)
    decode_piece_list(encode_piece_list(pieces))


def test_a_file_that_changes_meanwhile_is_no_model(tiny_folder: Path, tmp_path: Path) -> None:
    folder = save_tiny("llama", 0, tmp_path / "model")
    with pytest.raises(BadCheckpoint, match="changed while"):
        make_piece_list(folder, "tiny", lambda done, total: (folder / "model.safetensors").touch())


def test_a_gguf_that_is_gone_or_another_is_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf")
    folder = ingested(tmp_path / "one.gguf", tmp_path / "model")
    with (tmp_path / "one.gguf").open("ab") as file:
        file.write(b"more")
    with pytest.raises(BadCheckpoint, match="it had"):
        make_piece_list(folder, "tiny")
    (tmp_path / "one.gguf").unlink()
    with pytest.raises(BadCheckpoint, match=r"one\.gguf"):
        make_piece_list(folder, "tiny")


def weights_of(data: dict[str, Any]) -> dict[str, Any]:
    return next(file for file in data["files"] if file["name"].endswith(".safetensors"))


def a_list(**changes: Any) -> dict[str, Any]:
    """One that is right, but for the changes."""
    small = {"num_bytes": 4, "pieces": [[0, 4, DIGEST, ""]], "whole_sha256": ""}
    files = [
        {"name": "config.json", **small},
        {
            "name": "a.safetensors",
            "num_bytes": 100,
            "whole_sha256": "",
            "pieces": [[0, 4, DIGEST, ""], [8, 4, DIGEST, "x"]],
        },
    ]
    return {"version": LIST_VERSION, "model": "m", "format": "safetensors", "files": files} | changes


def weights(**changes: Any) -> dict[str, Any]:
    data = a_list()
    data["files"][1] |= changes
    return data


def config(**changes: Any) -> dict[str, Any]:
    data = a_list()
    data["files"][0] |= changes
    return data


def more(*files: dict[str, Any], **changes: Any) -> dict[str, Any]:
    data = a_list(**changes)
    data["files"] += files
    return data


OTHER = {"num_bytes": 9, "pieces": [], "whole_sha256": ""}


def engines(**changes: Any) -> dict[str, Any]:
    file = {"name": "tokenizer.json", "num_bytes": 4, "pieces": [[0, 4, DIGEST, ""]], "reader": "engine"}
    return more({**file, **changes})


@pytest.mark.parametrize(
    "data",
    [
        a_list(version=LIST_VERSION - 1),
        a_list(version=LIST_VERSION + 1),
        a_list(version=float(LIST_VERSION)),
        a_list(version=True),
        a_list(model=""),
        a_list(model="a\x1b[2J"),
        a_list(model="x" * 257),
        a_list(model=None),
        a_list(format="pickle"),
        a_list(format="gguf"),
        a_list(files=[]),
        a_list(files={}),
        a_list(files=a_list()["files"][:1]),
        a_list(files=a_list()["files"][1:]),
        a_list(files=a_list()["files"] * 2),
        more({"name": "A.safetensors", **OTHER}),
        more({"name": "tokenizer.py", **OTHER}),
        more({"name": "b.gguf", **OTHER}),
        more({"name": "tokenizer.json", **OTHER}),
        engines(name="tokenizer.py"),
        engines(name="config.json"),
        engines(name="b.safetensors"),
        engines(name="../tokenizer.json"),
        engines(name="Tokenizer.json"),
        engines(reader="anyone"),
        engines(pieces=[[0, 4, DIGEST, "x"]]),
        engines(pieces=[[0, 3, DIGEST, ""]]),
        a_list(files=[a_list()["files"][0], {**a_list()["files"][1], "reader": "engine"}]),
        more({"name": "pieces.json", **OTHER}),
        more({"name": "index.json", **OTHER}),
        more({"name": "../b.safetensors", **OTHER}),
        more({"name": "..\\b.safetensors", **OTHER}),
        more({"name": "/b.safetensors", **OTHER}),
        more({"name": "C:b.safetensors", **OTHER}),
        more({"name": ".b.safetensors", **OTHER}),
        more({"name": "b\0.safetensors", **OTHER}),
        more({"name": "b\n.safetensors", **OTHER}),
        more({"name": "nul.safetensors", **OTHER}),
        more({"name": "\u202eb.safetensors", **OTHER}),
        more({"name": "é" * 120 + ".safetensors", **OTHER}),
        more({"name": "b.safetensors", **OTHER, "num_bytes": 0}),
        more({"name": "b.safetensors", **OTHER, "num_bytes": -1}),
        more({"name": "b.safetensors", **OTHER, "num_bytes": 1 << 63}),
        more(*({"name": f"{number}.safetensors", **OTHER} for number in range(4096))),
        weights(whole_sha256="abc"),
        weights(pieces=[[0, 4, DIGEST.upper(), "x"]]),
        weights(pieces=[[0, 4, "../../etc/passwd", "x"]]),
        weights(pieces=[[0, 4, DIGEST + "\n", "x"]]),
        weights(pieces=[[0, 0, DIGEST, "x"]]),
        weights(pieces=[[0, -4, DIGEST, "x"]]),
        weights(pieces=[[-4, 4, DIGEST, "x"]]),
        weights(pieces=[[97, 4, DIGEST, "x"]]),
        weights(pieces=[[0, 4, DIGEST, "x"], [3, 4, DIGEST, "x"]]),
        weights(pieces=[[8, 4, DIGEST, "x"], [0, 4, DIGEST, "x"]]),
        weights(pieces=[[0, 4, DIGEST, "x"], [8, 5, DIGEST, "x"]]),
        weights(pieces=[[0, MAX_PIECE_BYTES + 1, DIGEST, "x"]], num_bytes=1 << 40),
        weights(pieces=[[0, 4, DIGEST, "x" * 1025]]),
        weights(pieces=[[0, 4, DIGEST, 5]]),
        weights(pieces=[[0, 4]]),
        config(pieces=[[0, 3, DIGEST, ""]]),
        config(pieces=[[0, 1, DIGEST, ""], [2, 2, DIGEST, ""]]),
        config(pieces=[[0, 4, DIGEST, "x"]]),
        config(pieces=[]),
        weights(
            pieces=[[i << 24, 1 << 24, hashlib.sha256(bytes([i])).hexdigest(), ""] for i in range(33)],
            num_bytes=1 << 40,
        ),
    ],
)  # fmt: skip
def test_hostile_lists_are_refused(data: dict[str, Any]) -> None:
    decode_piece_list(json.dumps(a_list()).encode())
    decode_piece_list(json.dumps(engines()).encode())
    with pytest.raises(BadMessage):
        decode_piece_list(json.dumps(data).encode())


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"{", b"null", b"\xff", b" " * (MAX_LIST_BYTES + 1)])
def test_what_is_no_list_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_piece_list(data)


class Anything:
    """JSON that has a list's keys, with values that are nearly right, or anything."""

    junk = st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    digest = st.just(DIGEST) | st.text("0123456789abcdef", min_size=60, max_size=66)
    number = st.integers(-2, 1 << 25) | junk
    piece = st.tuples(number, number, digest | junk, st.sampled_from(["", "x"]) | junk) | junk
    name = st.sampled_from(["config.json", "a.safetensors", "index.json", "b.gguf"]) | st.text(max_size=30)
    file = st.fixed_dictionaries(
        {"name": name | junk, "num_bytes": number, "pieces": st.lists(piece, max_size=4) | junk}
    )
    whole = st.fixed_dictionaries(
        {
            "version": st.just(1) | junk,
            "model": st.text(max_size=9) | junk,
            "format": st.sampled_from(["gguf", "safetensors"]) | junk,
            "files": st.lists(file, max_size=4) | junk,
        }
    )


@settings(max_examples=300, deadline=None)
@given(st.one_of(Anything.whole, Anything.junk))
def test_anything_is_a_list_that_holds_or_refused(data: Any) -> None:
    try:
        pieces = decode_piece_list(json.dumps(data).encode("utf-8", "surrogatepass"))
    except BadMessage:
        return
    held(pieces)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_are_a_list_that_holds_or_refused(listed: PieceList, data: st.DataObject) -> None:
    wire = bytearray(encode_piece_list(listed))
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        pieces = decode_piece_list(bytes(wire))
    except BadMessage:
        return
    held(pieces)


def held(pieces: PieceList) -> None:
    """What readers rely on."""
    assert len({file.name for file in pieces.files}) == len(pieces.files)
    for file in pieces.files:
        assert Path(file.name).name == file.name
        assert not file.name.startswith(".")
        end = 0
        for piece in file.pieces:
            assert end <= piece.offset < piece.offset + piece.num_bytes <= file.num_bytes
            assert piece.num_bytes <= MAX_PIECE_BYTES
            assert len(piece.digest) == 64
            end = piece.offset + piece.num_bytes


def test_a_list_that_is_too_long_is_not_sent(listed: PieceList) -> None:
    pieces = tuple(PlacedPiece(8 * index, 8, DIGEST, "x" * 900) for index in range(20_000))
    file = ListedFile(name="b.safetensors", num_bytes=1 << 30, pieces=pieces)
    with pytest.raises(BadMessage, match="more than can be shared"):
        encode_piece_list(msgspec.structs.replace(listed, files=(*listed.files, file)))
