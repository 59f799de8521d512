"""Opening a model's folder, whatever it holds."""

from __future__ import annotations

from pathlib import Path

from shard.checkpoint import Checkpoint
from shard.gguf_checkpoint import GgufCheckpoint
from shard.gguf_index import INDEX_FILE
from shard.safetensors_checkpoint import SafetensorsCheckpoint
from shard.shared_model import is_skeleton, read_list
from shard.unread import Unread
from shard.weight_folder import FetchPiece, PiecedFolder, PlainFolder, WeightFolder
from transport.errors import BadCheckpoint, ModelNotFound
from transport.pieces.store import PieceStore


def open_checkpoint(path: Path, *, pieces: PieceStore | None = None, fetch: FetchPiece | None = None) -> Checkpoint:
    """The checkpoint in folder `path`: a Hugging Face folder, what `ingest_gguf` made, or, with weights from the store
    `pieces`, what `materialize` made. A piece that lacks there is asked for from `fetch`. Raises PotluckError."""
    if not path.is_dir():
        raise ModelNotFound(f"there is no model folder {path}", hint="potluck list shows what is there; pull it first")
    weights: WeightFolder = PlainFolder(path)
    if is_skeleton(path):
        if pieces is None:
            raise BadCheckpoint(f"the weights of {path} lie elsewhere, in pieces", hint="load it through the pool")
        weights = PiecedFolder(path, read_list(path), pieces, fetch=fetch)
    return _opened(path, weights)


def open_unread(path: Path) -> Checkpoint:
    """The model in folder `path` with made-up weights, for measuring: those of the model need not be on this host.
    Raises PotluckError."""
    if is_skeleton(path):
        return Unread(_opened(path, PiecedFolder(path, read_list(path), None)))
    return Unread(open_checkpoint(path))


def _opened(path: Path, weights: WeightFolder) -> Checkpoint:
    if (path / INDEX_FILE).is_file():
        return GgufCheckpoint(path, weights=weights)
    return SafetensorsCheckpoint(path, weights=weights)
