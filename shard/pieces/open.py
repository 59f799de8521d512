"""The checkpoint in a model's folder is opened, whatever the folder holds."""

from __future__ import annotations

from pathlib import Path

from shard.formats.checkpoint import Checkpoint
from shard.formats.gguf.checkpoint import GgufCheckpoint
from shard.formats.gguf.index import INDEX_FILE
from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from shard.formats.weight_folder import FetchPiece, PieceFolder, PlainFolder, WeightFolder
from shard.formats.weights_form import DummyWeights
from shard.pieces.metadata import is_metadata_folder, read_list
from transport.errors import BadCheckpoint, ModelNotFound
from transport.pieces.store import PieceStore


def open_checkpoint(path: Path, *, pieces: PieceStore | None = None, fetch: FetchPiece | None = None) -> Checkpoint:
    """The checkpoint in folder `path`: a Hugging Face folder, what `ingest_gguf` made, or, with weights from the store
    `pieces`, what `write_metadata_from_store` made. A piece that lacks there is asked for from `fetch`. Raises
    PotluckError."""
    if not path.is_dir():
        raise ModelNotFound(f"there is no model folder {path}", hint="potluck list shows what is there; pull it first")
    weights: WeightFolder = PlainFolder(path)
    if is_metadata_folder(path):
        if pieces is None:
            raise BadCheckpoint(f"the weights of {path} lie elsewhere, in pieces", hint="load it through the pool")
        weights = PieceFolder(path, read_list(path), pieces, fetch=fetch)
    return _opened(path, weights)


def open_with_dummy_weights(path: Path) -> Checkpoint:
    """The model in folder `path` with made-up weights, for measuring: those of the model need not be on this host.
    Raises PotluckError."""
    if is_metadata_folder(path):
        return DummyWeights(_opened(path, PieceFolder(path, read_list(path), None)))
    return DummyWeights(open_checkpoint(path))


def _opened(path: Path, weights: WeightFolder) -> Checkpoint:
    if (path / INDEX_FILE).is_file():
        return GgufCheckpoint(path, weights=weights)
    return SafetensorsCheckpoint(path, weights=weights)
