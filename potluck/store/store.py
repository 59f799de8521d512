"""The store: a folder of models that several processes may use at once.

    HOME/models/NAME/      a whole model: potluck.json, and its files or where they lie
    HOME/downloads/NAME/   what a pull that was cut off goes on from
    HOME/locks/NAME.lock   held by whoever works on the model

A model is built in a folder aside and put in place by one rename, so that a kill leaves nothing half made.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from potluck.paths import home_dir
from potluck.store.build import Workplace, build, files_of
from potluck.store.disk import translated_write_errors
from potluck.store.hub import delete_snapshot
from potluck.store.locking import locked
from potluck.store.manifest import StoredModel, read_manifest, write_manifest
from potluck.store.progress import Progress, ignore_progress
from potluck.store.sources import ALIASES, HubSource, LocalSource, Source, check_name, looks_like_path, parse_source
from potluck.store.supply import PeerFiles, Supply, offline_by_environment
from shard.gguf_index import INDEX_FILE, read_index
from shard.open import open_checkpoint
from transport.errors import BadCheckpoint, ModelNotFound, PotluckError, UnsupportedModel

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

    def resolve(self, name: str, progress: Progress = ignore_progress) -> StoredModel:
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
            return self._up_to_date(model)

    def pull(self, source: str, progress: Progress = ignore_progress) -> StoredModel:
        """Fetch the model, or go on fetching it; the one in the store if it is whole and unchanged.

        Raises BadRequest, ModelNotFound, DownloadFailed, NoSpace, BadCheckpoint or UnsupportedModel.
        """
        parsed = parse_source(source)
        name = self._free_name(parsed)
        with locked(self._lock(name), progress):
            existing = self._read(name)
            if existing is not None and _is_current(existing, parsed):
                return self._up_to_date(existing)
            place = Workplace(
                folder=self._models() / f".building-{_slug(name)}",
                downloads=self._downloads(name),
                supply=Supply(
                    is_offline=self._offline or offline_by_environment(), peers=self._peers, copies=self.copies
                ),
            )
            self._build(parsed, name, place, progress)
        model = self._read(name)
        if model is None:
            raise PotluckError(f"{name} was removed while it was pulled", hint="pull it again")
        return model

    def remove(self, name: str) -> StoredModel:
        """Forget the model and delete what was downloaded for it; files used in place stay. Returns what was removed.

        A process that has it open keeps its files until it ends, but could not open them again.
        """
        model = self.show(name)
        snapshot = _snapshot(model)
        with locked(self._lock(model.name), ignore_progress), translated_write_errors(self.root, model.name):
            self._discard(model.name)
            shutil.rmtree(self._downloads(model.name), ignore_errors=True)
        if snapshot is not None:
            delete_snapshot(snapshot)
        return model

    def _up_to_date(self, model: StoredModel) -> StoredModel:
        """The model with what this version knows of its files: an older one may have recorded less. Raises
        BadCheckpoint."""
        if model.spec.is_current:
            return model
        checkpoint = open_checkpoint(model.path)
        try:
            renewed = replace(model, spec=checkpoint.spec)
        finally:
            checkpoint.close()
        folder = self._folder(model.name)
        recorded = "." if model.path == folder.resolve() else str(model.path)
        with contextlib.suppress(OSError):  # One that can't be written is looked at again the next time.
            write_manifest(folder, renewed, recorded_path=recorded)
        return renewed

    def _build(self, source: Source, name: str, place: Workplace, progress: Progress) -> None:
        with translated_write_errors(self.root, name):
            shutil.rmtree(place.folder, ignore_errors=True)
            place.folder.mkdir(parents=True)
        try:
            build(source, name, place, progress)
            with translated_write_errors(self.root, name):
                self._discard(name)
                place.folder.replace(self._folder(name))
        except (BadCheckpoint, UnsupportedModel):
            shutil.rmtree(place.downloads, ignore_errors=True)  # Nobody will go on with it.
            raise
        finally:
            shutil.rmtree(place.folder, ignore_errors=True)
        shutil.rmtree(place.downloads, ignore_errors=True)

    def _discard(self, name: str) -> None:
        """Take the model out in one step, then delete it."""
        aside = self._models() / f".removing-{_slug(name)}"
        shutil.rmtree(aside, ignore_errors=True)
        if self._folder(name).exists():
            self._folder(name).replace(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _free_name(self, source: Source) -> str:
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

    def copies(self, sha256: str) -> builtins.list[Path]:
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


def _snapshot(model: StoredModel) -> Path | None:
    """Where the hub's client keeps the model's files."""
    if not model.source.startswith("hf:") or not model.is_present:
        return None
    if (model.path / INDEX_FILE).is_file():
        return Path(read_index(model.path).file)  # The folder is the store's own; its index points to the file.
    return model.path


def _is_current(model: StoredModel, source: Source) -> bool:
    if model.source != source.text or not model.is_whole:
        return False
    return not isinstance(source, LocalSource) or model.files == files_of(source.path)
