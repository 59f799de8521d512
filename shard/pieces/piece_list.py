"""A piece list is encoded, checked when it comes from elsewhere, and asked which pieces a stage needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import PureWindowsPath
from typing import Literal

import msgspec

from shard.formats.gguf.index import INDEX_FILE
from shard.formats.safetensors import WEIGHT_INDEX
from shard.formats.spec import ModelSpec
from shard.pieces.cut_files import CONFIG, ENGINE_FILES
from transport.errors import BadMessage
from transport.messages.pieces import (
    LIST_VERSION,
    MAX_FILE_BYTES,
    MAX_LIST_BYTES,
    MAX_PIECE_BYTES,
    ListedFile,
    Piece,
    PieceList,
)
from transport.pieces.store import is_digest

MAX_FILES = 4096
MAX_METADATA_BYTES = 512 << 20
"""What every stage needs: it is kept apart, and asked for before anything else is known of the model."""

_MAX_NAME_BYTES = 200
_MAX_MODEL_CHARACTERS = 256
_MAX_TENSOR_CHARACTERS = 1024
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_SMALL = {"gguf": (CONFIG, INDEX_FILE), "safetensors": (CONFIG, WEIGHT_INDEX)}
_decoder = msgspec.json.Decoder(PieceList, strict=True)


def encode_piece_list(pieces: PieceList) -> bytes:
    """Raises BadMessage for one that no host would take."""
    _check(pieces)
    data = msgspec.json.encode(pieces)
    if len(data) > MAX_LIST_BYTES:
        raise BadMessage(f"the list of the pieces of {pieces.model} takes {len(data):,} bytes, more than can be shared")
    return data


def decode_piece_list(data: bytes) -> PieceList:
    """Raises BadMessage for whatever is not exactly what `encode_piece_list` may give."""
    if len(data) > MAX_LIST_BYTES:
        raise BadMessage(f"a piece list of {len(data):,} bytes; it may have {MAX_LIST_BYTES:,}")
    try:
        pieces = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"a piece list can't be understood: {error}") from error
    _check(pieces)
    return pieces


def list_digest(data: bytes) -> str:
    """What the model with this list goes by."""
    return hashlib.sha256(data).hexdigest()


def _check(pieces: PieceList) -> None:
    if pieces.version != LIST_VERSION:
        raise BadMessage(
            f"a piece list of version {pieces.version}, not {LIST_VERSION}", hint="update potluck on both hosts"
        )
    if not pieces.model or len(pieces.model) > _MAX_MODEL_CHARACTERS or not pieces.model.isprintable():
        raise BadMessage(f"a piece list is of a model called {pieces.model[:80]!r}")
    if not 1 <= len(pieces.files) <= MAX_FILES:
        raise BadMessage(f"a piece list of {len(pieces.files):,} files")
    names = [file.name for file in pieces.files]
    if len({name.casefold() for name in names}) != len(names):
        raise BadMessage("a piece list names a file twice")
    small = _SMALL[pieces.format]
    if CONFIG not in names or (pieces.format == "gguf" and INDEX_FILE not in names):
        raise BadMessage("a piece list lacks the files that a model is opened with")
    num_weights = sum(file.name not in small and file.reader == "stage" for file in pieces.files)
    if num_weights < 1 or (pieces.format == "gguf" and num_weights > 1):
        raise BadMessage(f"a piece list of a {pieces.format} model has {num_weights} weight files")
    for file in pieces.files:
        _check_name(file.name)
        is_engines = file.reader == "engine"
        is_known = file.name in ENGINE_FILES if is_engines else file.name in small
        if not is_known and (is_engines or not file.name.endswith(f".{pieces.format}")):
            raise BadMessage(f"a piece list has the file {file.name!r}, which is no part of a {pieces.format} model")
        _check_file(file, is_whole=is_known)
    _check_metadata(pieces.files)


def _check_name(name: str) -> None:
    """A name that means the same file on every system, in whichever folder it is put."""
    if (
        not 1 <= len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES
        or _UNSAFE.search(name)
        or name.startswith(".")
        or name.endswith((".", " "))
        or not name.isprintable()
        or PureWindowsPath(name).is_reserved()
    ):
        raise BadMessage(f"a piece list has a file called {name[:80]!r}", hint="give the model's files plain names")


def _check_file(file: ListedFile, *, is_whole: bool) -> None:
    if not 0 < file.num_bytes <= MAX_FILE_BYTES or (file.whole_sha256 and not is_digest(file.whole_sha256)):
        raise BadMessage(f"a piece list has {file.name} of {file.num_bytes:,} bytes")
    end = 0
    for piece in file.pieces:
        if not is_digest(piece.digest):
            raise BadMessage(f"a piece of {file.name} is called {piece.digest[:80]!r}")
        if not 0 < piece.num_bytes <= MAX_PIECE_BYTES:
            raise BadMessage(f"a piece of {file.name} has {piece.num_bytes:,} bytes")
        if len(piece.tensor) > _MAX_TENSOR_CHARACTERS or (is_whole and piece.tensor):
            raise BadMessage(f"a piece of {file.name} is of a tensor called {piece.tensor[:80]!r}")
        if piece.offset < end or (is_whole and piece.offset > end):
            raise BadMessage(f"pieces of {file.name} overlap, leave gaps or are out of order at byte {piece.offset:,}")
        end = piece.offset + piece.num_bytes
    if end > file.num_bytes or (is_whole and end < file.num_bytes):
        raise BadMessage(f"the pieces of {file.name} end at byte {end:,}, the file at byte {file.num_bytes:,}")


def _check_metadata(files: Sequence[ListedFile]) -> None:
    sizes: dict[str, int] = {}
    metadata_bytes = 0
    for file in files:
        for piece in file.pieces:
            if sizes.setdefault(piece.digest, piece.num_bytes) != piece.num_bytes:
                raise BadMessage(f"piece {piece.digest[:12]} has two sizes")
            metadata_bytes += 0 if piece.tensor else piece.num_bytes
    if metadata_bytes > MAX_METADATA_BYTES:
        raise BadMessage(f"{metadata_bytes:,} bytes of a model are of no tensor, more than any model has")


_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EMBEDDING = "model.embed_tokens."
_NORM = "model.norm."
_LM_HEAD = "lm_head."
# Computed from the config by every model class; old checkpoints store them all the same.
_COMPUTED = "rotary_emb.inv_freq"


def metadata_pieces(pieces: PieceList) -> dict[int, Piece]:
    """What every host needs to open the model, by number in the list."""
    return _select(pieces, lambda tensor: not tensor)


def engine_pieces(pieces: PieceList) -> dict[int, Piece]:
    """What the host of the engine needs besides, by number in the list."""
    return _select(pieces, lambda tensor: True, reader="engine")


def stage_pieces(pieces: PieceList, model: ModelSpec, first: int, last: int) -> dict[int, Piece]:
    """What a stage of layers [first, last) reads, by number in the list: its tensors' pieces and the nameless ones."""
    is_first, is_last = first == 0, last == model.num_layers

    def is_needed(tensor: str) -> bool:
        if not tensor:
            return True
        if tensor.endswith(_COMPUTED):
            return False
        match = _LAYER.match(tensor)
        if match is not None:
            return first <= int(match[1]) < last
        if tensor.startswith(_EMBEDDING):
            return is_first or (is_last and model.tied_embeddings)
        if tensor.startswith(_NORM):
            return is_last
        return tensor.startswith(_LM_HEAD) and is_last and not model.tied_embeddings

    return _select(pieces, is_needed)


def _select(
    pieces: PieceList, is_selected: Callable[[str], bool], reader: Literal["stage", "engine"] = "stage"
) -> dict[int, Piece]:
    placed = ((file, piece) for file in pieces.files for piece in file.pieces)
    return {
        number: Piece(piece.digest, piece.num_bytes)
        for number, (file, piece) in enumerate(placed)
        if file.reader == reader and is_selected(piece.tensor)
    }
