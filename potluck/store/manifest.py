"""What the store knows of a model, kept as potluck.json beside its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shard.formats.gguf.index import INDEX_FILE, read_index
from shard.formats.spec import ModelSpec
from transport.errors import BadCheckpoint
from transport.process.files import write_atomic

MANIFEST_FILE = "potluck.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """`sha256` is None for files that were never downloaded: of those, the time shows whether they changed."""

    name: str
    num_bytes: int
    modified_ns: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """`path` is the folder that `open_checkpoint` and AutoTokenizer take. `source` is what to pull it again from."""

    name: str
    source: str
    path: Path
    files: tuple[StoredFile, ...]
    spec: ModelSpec

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def is_present(self) -> bool:
        """False if someone moved or deleted the files that it points to."""
        try:
            paths = self._paths()
        except BadCheckpoint:
            return False
        return (self.path / "config.json").is_file() and all(path.is_file() for path in paths)

    @property
    def is_complete(self) -> bool:
        """False also if one of them has another size than when it was pulled."""
        return self.is_present and all(
            path.stat().st_size == file.num_bytes for path, file in zip(self._paths(), self.files, strict=True)
        )

    def paths_of(self, sha256: str) -> list[Path]:
        """Where files of that checksum lie, as far as they are there."""
        if not any(file.sha256 == sha256 for file in self.files) or not self.is_present:
            return []
        return [path for path, file in zip(self._paths(), self.files, strict=True) if file.sha256 == sha256]

    def weight_paths(self) -> list[Path]:
        """Where its weight files lie; empty if its index can't be read."""
        try:
            return [path for path in self._paths() if path.suffix in (".gguf", ".safetensors")]
        except BadCheckpoint:
            return []

    def _paths(self) -> list[Path]:
        """Where `files` lie. Raises BadCheckpoint."""
        if (self.path / INDEX_FILE).is_file():
            return [self.path / read_index(self.path).file]
        return [self.path / file.name for file in self.files]

    def to_json(self) -> dict[str, Any]:
        data = msgspec.to_builtins(self, enc_hook=str)
        assert isinstance(data, dict)
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    version: int
    name: str
    source: str
    path: str
    files: tuple[StoredFile, ...]
    spec: ModelSpec


def write_manifest(folder: Path, model: StoredModel, *, recorded_path: str) -> None:
    """`recorded_path` is "." for a model that lies in its own folder, so that a store can be moved."""
    manifest = {"version": MANIFEST_VERSION, **model.to_json(), "path": recorded_path}
    write_atomic(folder / MANIFEST_FILE, msgspec.json.format(msgspec.json.encode(manifest)), private=False)


def read_manifest(folder: Path) -> StoredModel | None:
    """None if there is no model, or one of another version of this file."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=_Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise BadCheckpoint(f"{folder / MANIFEST_FILE} can't be read: {error}", hint="pull the model again") from error
    if manifest.version != MANIFEST_VERSION:
        return None
    return StoredModel(
        name=manifest.name,
        source=manifest.source,
        path=(folder / manifest.path).resolve(),
        files=manifest.files,
        spec=manifest.spec,
    )
