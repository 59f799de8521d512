"""What tests of hub pulls share."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from shard.pieces.open import open_checkpoint
from tests.support.store.hub_server import REPOSITORY

SOURCE = f"hf:{REPOSITORY}"
WEIGHTS = "model.safetensors"
# Small, so that a tiny model comes in many.
SEGMENT_BYTES = 64 << 10


def size_of(*paths: Path) -> int:
    return sum(path.stat().st_size for path in paths)


def incomplete(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.incomplete"))


def assert_right(path: Path, repository: Path) -> None:
    for file in repository.iterdir():
        if file.suffix in (".json", ".safetensors"):
            assert (path / file.name).read_bytes() == file.read_bytes()
    with closing(open_checkpoint(path)) as checkpoint:
        assert checkpoint.tensors
