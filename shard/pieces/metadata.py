"""A model that is shared in pieces: what the host that has it offers, and the folder that others open it from.

That folder holds config.json, the indexes, the headers of safetensors files, the few tensors that a reader looks at
before it loads any, and the piece list: all but the weights. On the engine's host the tokenizer's files lie there too.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shard.formats.safetensors import LENGTH_BYTES, header_bytes
from shard.pieces.cut_files import HashProgress, make_piece_list, model_files, stamp_of
from shard.pieces.piece_list import decode_piece_list, encode_piece_list, list_digest
from transport.errors import BadCheckpoint, BadMessage
from transport.messages.pieces import ListedFile, PieceList, PlacedPiece
from transport.pieces.disk_space import translate_write_errors
from transport.pieces.store import PieceStore
from transport.process.files import FileStamp, write_atomic

LIST_FILE = "pieces.json"
OPENING_PIECES = "kept"
"""The folder, beside the small files, of what of the weight files opening the model reads."""
_SHARE_RECORDS = "offers"

ReadPiece = Callable[[ListedFile, PlacedPiece], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFolders:
    """`skeleton` is what `write_metadata_from_store` makes for an engine, `weights` the folder with the weight files,
    and `stamps`
    tell whether those of either folder are still what the list says, by name."""

    digest: str
    pieces: PieceList
    metadata: Path
    metadata_stamps: Mapping[str, FileStamp]
    weights: Path
    weight_stamps: Mapping[str, FileStamp]

    @property
    def list_file(self) -> Path:
        return self.metadata / LIST_FILE


def share_model(
    folder: Path,
    model: str,
    shared: Path,
    progress: HashProgress = lambda done, total: None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> SharedFolders:
    """Make the model in `folder` one that others can get in pieces; `model` is its name, `shared` the folder where such
    models are kept, by digest.

    Reads all of the files the first time, and again when one of them has changed. Raises BadCheckpoint,
    UnsupportedModel, NoSpace.
    """
    files = model_files(folder)
    if len({path.parent for path in files.weights.values()}) != 1:
        raise BadCheckpoint(f"the weight files of {folder} lie in several folders", hint="put them into one")
    known = shared / _SHARE_RECORDS / f"{list_digest(msgspec.json.encode([str(folder.resolve()), model]))[:32]}.json"
    facts = _ShareFacts(
        stamps=files.stamps(), small={name: list_digest(content) for name, content in files.non_weights.items()}
    )
    record = _read_record(known)
    pieces = (
        None if record is None or record.facts != facts else _read_list_if_known(shared / record.digest, record.digest)
    )
    if pieces is None:
        pieces = make_piece_list(folder, model, progress, checksums=checksums)
        facts = _ShareFacts(stamps=files.stamps(), small=facts.small)
    data = encode_piece_list(pieces)
    digest = list_digest(data)
    metadata = shared / digest

    def read(file: ListedFile, piece: PlacedPiece) -> bytes:
        if file.name in files.non_weights:
            return files.non_weights[file.name][piece.offset : piece.offset + piece.num_bytes]
        with files.weights[file.name].open("rb") as source:
            source.seek(piece.offset)
            return source.read(piece.num_bytes)

    _write_metadata(pieces, data, metadata, read, for_engine=True)
    if record is None or record != _ShareRecord(facts=facts, digest=digest):
        _write_record(known, _ShareRecord(facts=facts, digest=digest))
    return SharedFolders(
        digest=digest,
        pieces=pieces,
        metadata=metadata,
        metadata_stamps={name: stamp_of(metadata / name) for name in files.non_weights if (metadata / name).exists()},
        weights=next(iter(files.weights.values())).parent,
        weight_stamps=facts.stamps,
    )


def write_metadata_from_store(pieces: PieceList, store: PieceStore, folder: Path, *, for_engine: bool = False) -> None:
    """Write the folder that the model is opened from; the nameless pieces are in the store, and those `for_engine` if
    its files are wanted too. At once or not at all, and nothing if it is there.

    Raises BadMessage for a list that makes no model, BadCheckpoint for a piece that lacks, NoSpace.
    """

    def read(file: ListedFile, piece: PlacedPiece) -> bytes:
        try:
            return store.path(piece.digest).read_bytes()
        except OSError as error:
            raise BadCheckpoint(
                f"piece {piece.digest[:12]} of {file.name} is not on this host", hint="load the model again"
            ) from error

    _write_metadata(pieces, encode_piece_list(pieces), folder, read, for_engine=for_engine)


def is_metadata_folder(folder: Path) -> bool:
    """Whether it was made by `write_metadata_from_store`: the weights are elsewhere."""
    return (folder / LIST_FILE).is_file()


def read_complete_list(folder: Path, digest: str, *, for_engine: bool = False) -> PieceList | None:
    """The list of the model with that digest, if all that `write_metadata_from_store` writes is in `folder`; else
    None."""
    pieces = _read_list_if_known(folder, digest)
    if pieces is None or not _is_complete(folder, pieces, encode_piece_list(pieces), for_engine=for_engine):
        return None
    return pieces


def read_list(folder: Path) -> PieceList:
    """That of a folder that `write_metadata_from_store` made. Raises BadCheckpoint."""
    path = folder / LIST_FILE
    try:
        return decode_piece_list(path.read_bytes())
    except (OSError, BadMessage) as error:
        raise BadCheckpoint(
            f"{path} can't be read: {error}", hint="remove that folder, and load the model again"
        ) from error


def shared_digests(shared: Path) -> set[str]:
    """Those of the models that this host has offered from its own files."""
    offers = (_read_record(path) for path in (shared / _SHARE_RECORDS).glob("*.json"))
    return {offer.digest for offer in offers if offer is not None}


def _write_metadata(pieces: PieceList, data: bytes, folder: Path, read: ReadPiece, *, for_engine: bool) -> None:
    if _is_complete(folder, pieces, data, for_engine=for_engine):
        return
    new = folder.with_name(f".{folder.name[:16]}-{secrets.token_hex(4)}")
    with translate_write_errors(folder.parent):
        new.mkdir(parents=True)
        try:
            for file in _files_of(pieces, for_engine=for_engine):
                start = _file_start(pieces, file, read)
                (new / file.name).write_bytes(start)
                for piece in _opening_pieces(file, len(start)):
                    (new / OPENING_PIECES).mkdir(exist_ok=True)
                    (new / OPENING_PIECES / piece.digest).write_bytes(read(file, piece))
            (new / LIST_FILE).write_bytes(data)
            if folder.exists():  # Somebody, or a power cut, has left only a part of it.
                folder.rename(new / "old")
            new.rename(folder)
        except OSError:
            # Else another process has made it meanwhile.
            if not _is_complete(folder, pieces, data, for_engine=for_engine):
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _file_start(pieces: PieceList, file: ListedFile, read: ReadPiece) -> bytes:
    """What of the file lies in a skeleton: all of a small one, the header of a safetensors file."""
    if not file.name.endswith(".safetensors"):
        return b"".join(read(file, piece) for piece in file.pieces)
    start = b""
    for piece in file.pieces:
        if piece.tensor or piece.offset != len(start):
            break
        start += read(file, piece)
        if len(start) >= LENGTH_BYTES:
            needed = header_bytes(Path(file.name), start, file.num_bytes)
            if len(start) >= needed:
                return start[:needed]
    raise BadMessage(f"the piece list of {pieces.model} lacks the header of {file.name}")


def _opening_pieces(file: ListedFile, header_end: int) -> list[PlacedPiece]:
    """What is looked at before a stage's tensors are read, beyond the header."""
    return [piece for piece in file.pieces if not piece.tensor and piece.offset >= header_end]


def _files_of(pieces: PieceList, *, for_engine: bool) -> list[ListedFile]:
    """Of which something lies in a skeleton."""
    return [file for file in pieces.files if not file.name.endswith(".gguf") and (for_engine or file.reader == "stage")]


def _is_complete(folder: Path, pieces: PieceList, data: bytes, *, for_engine: bool) -> bool:
    """Whether everything is there, as far as sizes tell."""
    try:
        if (folder / LIST_FILE).read_bytes() != data:
            return False
        for file in _files_of(pieces, for_engine=for_engine):
            size = (folder / file.name).stat().st_size
            if file.name.endswith(".safetensors"):
                with (folder / file.name).open("rb") as start:
                    if size != header_bytes(Path(file.name), start.read(LENGTH_BYTES), file.num_bytes):
                        return False
                if any(
                    (folder / OPENING_PIECES / one.digest).stat().st_size != one.num_bytes
                    for one in _opening_pieces(file, size)
                ):
                    return False
            elif size != file.num_bytes:
                return False
    except (OSError, BadCheckpoint):
        return False
    return True


class _ShareFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a list was made of: its small files' hashes, and what tells whether the weight files have changed."""

    stamps: dict[str, FileStamp]
    small: dict[str, str]


class _ShareRecord(msgspec.Struct, frozen=True, kw_only=True):
    facts: _ShareFacts
    digest: str


def _read_record(path: Path) -> _ShareRecord | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_ShareRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_record(path: Path, offer: _ShareRecord) -> None:
    with translate_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(offer), private=False)


def _read_list_if_known(folder: Path, digest: str) -> PieceList | None:
    """The list in the skeleton, None if it is not there or not that one."""
    try:
        data = (folder / LIST_FILE).read_bytes()
        return decode_piece_list(data) if list_digest(data) == digest else None
    except (OSError, BadMessage):
        return None
