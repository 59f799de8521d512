"""Opening a model's folder, whatever it holds."""

from __future__ import annotations

from pathlib import Path

from shard.checkpoint import Checkpoint
from shard.gguf_checkpoint import GgufCheckpoint
from shard.gguf_index import INDEX_FILE
from shard.safetensors_checkpoint import SafetensorsCheckpoint
from transport.errors import ModelNotFound


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`: a Hugging Face folder, or what `ingest_gguf` made. Raises PotluckError."""
    if not path.is_dir():
        raise ModelNotFound(f"there is no model folder {path}", hint="potluck list shows what is there; pull it first")
    if (path / INDEX_FILE).is_file():
        return GgufCheckpoint(path)
    return SafetensorsCheckpoint(path)
