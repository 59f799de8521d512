"""A hub snapshot is judged by its file list and headers first, then fetched into the hub's cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from potluck.store.disk import mb, require_space, translated_write_errors
from potluck.store.hub_fetcher import Fetcher
from potluck.store.hub_repository import CachedRepository, Hub, HubFile, RepositoryListing
from potluck.store.sources import HubSource, ProgressCallback, PullOptions, PullProgress
from potluck.store.transfer import RangeClient
from shard.formats.config import check_supported, read_config
from shard.formats.families import FAMILIES, backends_of
from shard.formats.safetensors import LENGTH_BYTES, header_bytes, weight_files
from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from shard.formats.spec import ModelSpec
from transport.errors import BadCheckpoint, DownloadFailed, ModelNotFound, PotluckError, UnsupportedModel, WrongBytes
from transport.process.files import write_atomic

# Most headers are smaller: one request a file.
FIRST_BYTES = 1 << 16
SAFETENSORS_INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

ReadStart = Callable[[int], bytes]


class ModelHeaders:
    """A folder that holds config.json, the index of the weights and files' beginnings. It stays for a pull that goes on
    later, and goes with `downloads` once the model is here."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.folder = folder
        self._repository = repository
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: Path) -> None:
        """One of the small files that say what the model is."""
        shutil.copyfile(path, self.folder / path.name)

    def check_config(self) -> None:
        """Raises UnsupportedModel for a model that no backend runs, as far as config.json says; BadCheckpoint."""
        with self._naming_repository():
            family = check_supported(read_config(self.folder))
        if not backends_of(family):
            raise UnsupportedModel(
                f"{self._repository} has the architecture {family}, which no backend here runs",
                hint=f"supported: {', '.join(FAMILIES)}",
            )

    def choose_weight_files(self, names: Sequence[str]) -> list[str]:
        """Of a repository's files, those that hold the model's weights. Raises BadCheckpoint or UnsupportedModel."""
        listed = {name for name in names if "/" not in name}
        kept = [path for path in self.folder.iterdir() if path.suffix == ".safetensors" and path.name not in listed]
        for path in kept:
            path.unlink()
        for name in listed:
            if name.endswith((".safetensors", ".bin", ".pth")):
                (self.folder / name).touch()
        with self._naming_repository():
            return [path.name for path in weight_files(self.folder)]

    def file_start(self, name: str) -> bytes:
        """What is here of a file's beginning."""
        return (self.folder / name).read_bytes()

    def discard_start(self, name: str) -> None:
        """What is here of a file's beginning may be wrong."""
        (self.folder / name).unlink()

    def read_header(self, name: str, num_bytes: int, read: ReadStart) -> bytes:
        """The beginning of a file of `num_bytes`, its header and maybe more; `read` gives its first so many bytes.
        Raises BadCheckpoint where the header can't be one, and what `read` raises."""
        path = self.folder / name
        start = path.read_bytes()
        if len(start) < min(FIRST_BYTES, num_bytes):
            start = read(min(FIRST_BYTES, num_bytes))
        with self._naming_repository():
            needed = header_bytes(path, start[:LENGTH_BYTES], num_bytes)
        if len(start) < needed:
            start = read(needed)
        write_atomic(path, start, private=False)
        return start

    def check(self, sizes: dict[str, int]) -> ModelSpec:
        """The whole model, by all headers: as it will be checked when it is here. Raises BadCheckpoint,
        UnsupportedModel."""
        with self._naming_repository(), closing(SafetensorsCheckpoint(self.folder, sizes)) as checkpoint:
            return checkpoint.spec

    @contextmanager
    def _naming_repository(self) -> Iterator[None]:
        """Errors name the repository instead of the folder here, and say that nothing was downloaded."""
        try:
            yield
        except BadCheckpoint as error:
            # Pulling again would not help.
            advice = "take another repository or revision of the model" if "again" in error.hint else error.hint
            hint = f"its weights were not downloaded; {advice}"
            raise BadCheckpoint(self._renamed(error.message), hint=hint) from error
        except UnsupportedModel as error:
            raise UnsupportedModel(self._renamed(error.message), hint=error.hint) from error

    def _renamed(self, message: str) -> str:
        renamed = message.replace(f"{self.folder}/", f"{self._repository}: ").replace(
            str(self.folder), self._repository
        )
        return renamed if self._repository in renamed else f"{self._repository}: {renamed}"


_SMALL_SUFFIXES = (".json", ".model", ".txt", ".jinja")


def fetch_snapshot(source: HubSource, downloads: Path, options: PullOptions, progress: ProgressCallback) -> Path:
    """The folder of the repository's files, or the path of its one .gguf. `downloads` is for what a pull that is cut
    off goes on from. Raises PotluckError."""
    progress(PullProgress(stage="download", done=0, total=None))
    hub = Hub.from_environment()
    if options.is_offline:
        return _from_cache(source, hub)
    listing = hub.listing(source)
    cached = CachedRepository(cache=hub.cache, repository=listing.repository, commit=listing.commit)
    with (
        RangeClient(listing.repository, hub.headers()) as client,
        Fetcher(
            cached, client, options, lambda name: hub.url(listing.repository, listing.commit, name), progress
        ) as fetcher,
    ):
        pull = _Pull(source=source, hub=hub, listing=listing, cached=cached, fetcher=fetcher, progress=progress)
        if source.file is not None:
            path = pull.one_file(source.file)
        else:
            folder = downloads / listing.commit
            with translated_write_errors(folder, f"what {source.text} is"):
                path = pull.full_folder(folder)
    cached.write_ref(source.revision)
    return path


def delete_snapshot(path: Path) -> None:
    """Free what `fetch_snapshot` downloaded to `path`, unless another revision uses the same files."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    parts = path.parts
    found = [at for at, part in enumerate(parts[:-1]) if part == "snapshots" and parts[at - 1].startswith("models--")]
    if not found:
        return
    snapshots = found[-1]
    repository = Path(*parts[:snapshots]).resolve()
    try:
        scanned = scan_cache_dir(repository.parent)
    except CacheNotFound:
        return
    # Of this repository alone: a copy of it elsewhere may have the same commit.
    scanned = replace(scanned, repos=frozenset(repo for repo in scanned.repos if repo.repo_path == repository))
    scanned.delete_revisions(parts[snapshots + 1]).execute()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pull:
    source: HubSource
    hub: Hub
    listing: RepositoryListing
    cached: CachedRepository
    fetcher: Fetcher
    progress: ProgressCallback

    def one_file(self, name: str) -> Path:
        if name not in self.listing.names:
            raise ModelNotFound(f"{self.source.repository} has no file {name}", hint=_ggufs(self.listing))
        file = self._file(name)
        self._announce_and_check_space([file])
        return self.fetcher.fetch(file)

    def full_folder(self, folder: Path) -> Path:
        """Small files and headers first: a model that can't be used is refused before its weights come."""
        if CONFIG_FILE not in self.listing.names:
            raise UnsupportedModel(f"{self.source.repository} has no config.json", hint=_ggufs(self.listing))
        model = ModelHeaders(folder, self.source.repository)
        model.add(self.fetcher.fetch(self._file(CONFIG_FILE)))
        model.check_config()
        _refuse_without_safetensors(self.source, self.listing)
        top = [name for name in self.listing.names if "/" not in name and name.endswith(_SMALL_SUFFIXES)]
        for path in self.fetcher.map_files(self.fetcher.fetch, [self._file(name) for name in top]):
            if path.name == SAFETENSORS_INDEX_FILE:
                model.add(path)
        weights = [self._file(name) for name in model.choose_weight_files(self.listing.names)]
        self.fetcher.map_files(lambda file: self._header(model, file), weights)
        model.check({file.name: file.num_bytes for file in weights})
        self._announce_and_check_space(weights)
        for file in weights:
            try:
                self.fetcher.fetch(file, model.file_start(file.name))
            except WrongBytes:
                model.discard_start(file.name)  # It may have been the beginning that was wrong.
                raise
        return self.cached.snapshot

    def _file(self, name: str) -> HubFile:
        return self.hub.file(self.source, self.listing, name)

    def _header(self, model: ModelHeaders, file: HubFile) -> bytes:
        here = self.cached.find(file)
        if here is None:
            return model.read_header(
                file.name, file.num_bytes, lambda count: self.fetcher.transfer.read_start(file, count)
            )

        def from_disk(count: int) -> bytes:
            with here.open("rb") as stream:
                return stream.read(count)

        return model.read_header(file.name, file.num_bytes, from_disk)

    def _announce_and_check_space(self, files: list[HubFile]) -> None:
        """Before the large files come: how much of them is lacking, and whether the disk has room for it."""
        lacking = [file for file in files if self.cached.find(file) is None]
        to_come = sum(self.fetcher.missing_bytes(file) for file in lacking)
        total = sum(file.num_bytes for file in files)
        require_space(self.cached.folder, to_come, self.source.text, setting="HF_HOME")
        says = f"{self.source.text}: {len(files)} file{'s' * (len(files) != 1)} of weights, {mb(total)}; " + (
            f"{mb(to_come)} to fetch" if to_come else "all here already"
        )
        self.fetcher.expect(sum(file.num_bytes for file in lacking))
        self.progress(PullProgress(stage="download", done=0, total=self.fetcher.total_bytes, says=says))


def _from_cache(source: HubSource, hub: Hub) -> Path:
    """The newest snapshot of that revision in the cache, if it is complete. Raises DownloadFailed."""
    from huggingface_hub import try_to_load_from_cache

    first = source.file or CONFIG_FILE
    found = try_to_load_from_cache(source.repository, first, cache_dir=hub.cache, revision=source.revision)
    if not isinstance(found, str):
        raise _unavailable_offline(source, f"its {first} is not in the hub's cache in {hub.cache}")
    path = Path(found)
    if source.file is not None:
        return path
    try:
        weight_files(path.parent)
    except (BadCheckpoint, UnsupportedModel) as error:
        raise _unavailable_offline(source, f"the hub's cache has only a part of it: {error.message}") from error
    return path.parent


def _unavailable_offline(source: HubSource, why: str) -> PotluckError:
    return DownloadFailed(
        f"{source.text} can't be pulled offline: {why}",
        hint="pull it once with a network: without --offline, and with HF_HUB_OFFLINE not set",
    )


def _refuse_without_safetensors(source: HubSource, listing: RepositoryListing) -> None:
    if any(name.endswith(".safetensors") and "/" not in name for name in listing.names):
        return
    if any(name.endswith((".bin", ".pth", ".pt")) for name in listing.names):
        raise UnsupportedModel(
            f"{source.repository} has no safetensors weights, only pickled ones (.bin, .pth), which can run code",
            hint=_ggufs(listing),
        )
    raise UnsupportedModel(f"{source.repository} has no safetensors weights", hint=_ggufs(listing))


def _ggufs(listing: RepositoryListing) -> str:
    ggufs = [name for name in listing.names if name.endswith(".gguf")]
    if ggufs:
        return f"name one of its GGUF files: hf:{listing.repository}/{ggufs[0]}"
    return "it has no GGUF file either: take another repository of the model"
