"""The pieces that a model's files consist of: cut, hashed, written down, and checked when a list comes from elsewhere.

A weight file's tensors are pieces of their own, of at most 16 MiB, under the names that the file's index has for them.
What opening a model reads (config.json, indexes, headers, and the few tensors that a reader looks at) has no name:
every stage needs it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from shard.formats.gguf.index import INDEX_FILE, GgufIndex, read_index
from shard.formats.safetensors import LENGTH_BYTES, WEIGHT_INDEX, header_bytes, parse_header, weight_files
from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from shard.formats.weight_folder import PlainFolder, read_exactly
from transport.errors import BadCheckpoint
from transport.messages.pieces import LIST_VERSION, MAX_PIECE_BYTES, ListedFile, PieceList, PlacedPiece
from transport.process.files import FileStamp

CONFIG = "config.json"
ENGINE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What turns text into ids and back, as far as a model has it: only the engine reads it."""

_READ_BYTES = 8 << 20
_MAX_THREADS = 4

HashProgress = Callable[[int, int], None]
"""Bytes hashed so far, and of all. Called from several threads, one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """`small` are whole files, as every host gets them, `engine` those that only the engine's host does; `weights`
    where the weight files lie, by their names there."""

    format: str
    small: Mapping[str, bytes]
    engine: Mapping[str, bytes]
    weights: Mapping[str, Path]

    @property
    def non_weights(self) -> dict[str, bytes]:
        """All that are no weights."""
        return {**self.small, **self.engine}

    def stamps(self) -> dict[str, FileStamp]:
        """Of the weight files. Raises BadCheckpoint."""
        return {name: stamp_of(path) for name, path in self.weights.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileRange:
    """Bytes [offset, offset + num_bytes) of a file."""

    offset: int
    num_bytes: int
    tensor: str


def model_files(folder: Path) -> ModelFiles:
    """Raises BadCheckpoint, UnsupportedModel."""
    small = {CONFIG: _read_small_file(folder / CONFIG)}
    engine = {name: _read_small_file(folder / name) for name in ENGINE_FILES if (folder / name).is_file()}
    if (folder / INDEX_FILE).is_file():
        index = read_index(folder)
        path = folder / index.file
        # Where the file lies here, and since when, is of no use elsewhere; and the list is to depend on neither.
        small[INDEX_FILE] = msgspec.json.encode(replace(index, file=path.name, mtime_ns=0))
        return ModelFiles(format="gguf", small=small, engine=engine, weights={path.name: path})
    if (folder / WEIGHT_INDEX).is_file():
        small[WEIGHT_INDEX] = _read_small_file(folder / WEIGHT_INDEX)
    weights = {path.name: path for path in weight_files(folder)}
    return ModelFiles(format="safetensors", small=small, engine=engine, weights=weights)


def stamp_of(path: Path) -> FileStamp:
    """Raises BadCheckpoint."""
    try:
        return FileStamp.of(path)
    except OSError as error:
        raise BadCheckpoint(
            f"can't open the model's file {path}: {error.strerror}", hint="put it back or pull the model again"
        ) from error


def make_piece_list(
    folder: Path,
    model: str,
    progress: HashProgress = lambda done, total: None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> PieceList:
    """The pieces of the model in `folder`, as `open_checkpoint` takes it; `model` is what the pool calls it.

    Reads all of the files. `checksums` are the SHA-256 of whole files, where they are known. Raises BadCheckpoint,
    UnsupportedModel.
    """
    files = model_files(folder)
    before = files.stamps()
    ranges = _gguf_ranges(folder) if files.format == "gguf" else _safetensors_ranges(folder, files.weights)
    hashed = _hash_ranges(files.weights, ranges, progress)
    if files.stamps() != before:
        raise BadCheckpoint(f"a file of {folder} changed while it was read", hint="let it come to rest, and try again")
    small = [
        ListedFile(name=name, num_bytes=len(content), pieces=tuple(_small_pieces(content)))
        for name, content in files.small.items()
    ]
    engine = [
        ListedFile(name=name, num_bytes=len(content), pieces=tuple(_small_pieces(content)), reader="engine")
        for name, content in files.engine.items()
        if content
    ]
    weights = [
        ListedFile(
            name=name,
            num_bytes=before[name].num_bytes,
            pieces=tuple(hashed[name]),
            whole_sha256=(checksums or {}).get(name, ""),
        )
        for name in sorted(files.weights)
    ]
    return PieceList(
        version=LIST_VERSION,
        model=model,
        format="gguf" if files.format == "gguf" else "safetensors",
        files=(*small, *weights, *engine),
    )


def _gguf_ranges(folder: Path) -> dict[str, list[_FileRange]]:
    from shard.formats.gguf.checkpoint import GgufCheckpoint  # The gguf package takes an eighth of a second.

    checkpoint = GgufCheckpoint(folder)  # It checks the file's size.
    checkpoint.close()
    index: GgufIndex = read_index(folder)
    placed = sorted(index.tensors, key=lambda tensor: tensor.offset)
    cuts = [cut for tensor in placed for cut in _split(tensor.offset, tensor.file_bytes, tensor.name)]
    return {Path(index.file).name: cuts}


def _safetensors_ranges(folder: Path, weights: Mapping[str, Path]) -> dict[str, list[_FileRange]]:
    read_on_opening = _read_on_opening(folder)
    found = {}
    for name, path in weights.items():
        with path.open("rb") as file:
            start = file.read(LENGTH_BYTES)
            size = stamp_of(path).num_bytes
            start += file.read(header_bytes(path, start, size) - LENGTH_BYTES)
        placed = sorted(parse_header(path, start, size), key=lambda tensor: tensor.offset)
        found[name] = list(_split(0, len(start), ""))
        for tensor in placed:
            stored = "" if (name, tensor.offset) in read_on_opening else tensor.name
            found[name] += _split(tensor.offset, tensor.file_bytes, stored)
    return found


class _RecordingFolder(PlainFolder):
    """Notes where each read begins."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: set[tuple[str, int]] = set()

    def read(self, file: str, out: np.ndarray, offset: int, what: str) -> None:
        self.reads.add((file, offset))
        super().read(file, out, offset, what)


def _read_on_opening(folder: Path) -> set[tuple[str, int]]:
    """The tensors that a reader looks at before anything is loaded, as (file, offset): biases that may be fillers, the
    order of GPTQ's groups."""
    noting = _RecordingFolder(folder)
    SafetensorsCheckpoint(folder, weights=noting).close()
    return noting.reads


def _split(offset: int, num_bytes: int, tensor: str) -> Iterable[_FileRange]:
    for at in range(0, num_bytes, MAX_PIECE_BYTES):
        yield _FileRange(offset=offset + at, num_bytes=min(MAX_PIECE_BYTES, num_bytes - at), tensor=tensor)


def _small_pieces(content: bytes) -> Iterable[PlacedPiece]:
    for cut in _split(0, len(content), ""):
        digest = hashlib.sha256(content[cut.offset : cut.offset + cut.num_bytes]).hexdigest()
        yield PlacedPiece(cut.offset, cut.num_bytes, digest)


def _hash_ranges(
    paths: Mapping[str, Path], ranges: Mapping[str, Sequence[_FileRange]], progress: HashProgress
) -> dict[str, list[PlacedPiece]]:
    total = sum(cut.num_bytes for some in ranges.values() for cut in some)
    done = 0
    lock = threading.Lock()
    buffers = threading.local()

    def note(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress(done, total)

    def hashed(fd: int, cut: _FileRange, name: str) -> PlacedPiece:
        if not hasattr(buffers, "block"):
            buffers.block = np.empty(_READ_BYTES, np.uint8)
        digest = hashlib.sha256()
        for at in range(0, cut.num_bytes, _READ_BYTES):
            block = buffers.block[: cut.num_bytes - at]
            read_exactly(fd, block, cut.offset + at, f"{cut.tensor or 'the header'} in {name}")
            digest.update(block)
            note(len(block))
        return PlacedPiece(cut.offset, cut.num_bytes, digest.hexdigest(), cut.tensor)

    found = {}
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for name, path in paths.items():
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                found[name] = list(pool.map(lambda cut, fd=fd, name=name: hashed(fd, cut, name), ranges[name]))
            finally:
                os.close(fd)
    return found


def _read_small_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"can't read {path}: {error.strerror}", hint="pull the model again") from error
