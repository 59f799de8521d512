"""A repository of a Hugging Face hub: judged by its list of files and their headers, then fetched into the hub's cache.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count, as everywhere. Offline, the cache is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from potluck.store.disk import require_space, translated_write_errors
from potluck.store.fetch import Fetcher
from potluck.store.hub_cache import CachedRepository
from potluck.store.hub_files import Hub, HubFile, Listing
from potluck.store.progress import Progress, PullProgress
from potluck.store.range_client import RangeClient
from potluck.store.remote_model import CONFIG_FILE, INDEX_FILE, RemoteModel
from potluck.store.sources import HubSource
from potluck.store.supply import Supply
from shard.safetensors_files import weight_files
from transport.errors import BadCheckpoint, DownloadFailed, ModelNotFound, PotluckError, UnsupportedModel, WrongBytes

_SMALL_SUFFIXES = (".json", ".model", ".txt", ".jinja")


def fetch_snapshot(source: HubSource, downloads: Path, supply: Supply, progress: Progress) -> Path:
    """The folder of the repository's files, or the path of its one .gguf. `downloads` is for what a pull that is cut
    off goes on from. Raises PotluckError."""
    progress(PullProgress(stage="download", done=0, total=None))
    hub = Hub.of_environment()
    if supply.is_offline:
        return _from_cache(source, hub)
    listing = hub.listing(source)
    place = CachedRepository(cache=hub.cache, repository=listing.repository, commit=listing.commit)
    with (
        RangeClient(listing.repository, hub.headers()) as client,
        Fetcher(
            place, client, supply, lambda name: hub.url(listing.repository, listing.commit, name), progress
        ) as fetcher,
    ):
        pull = _Pull(source=source, hub=hub, listing=listing, place=place, fetcher=fetcher, progress=progress)
        if source.file is not None:
            path = pull.one_file(source.file)
        else:
            aside = downloads / listing.commit
            with translated_write_errors(aside, f"what {source.text} is"):
                path = pull.whole_folder(aside)
    place.note_revision(source.revision)
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
    listing: Listing
    place: CachedRepository
    fetcher: Fetcher
    progress: Progress

    def one_file(self, name: str) -> Path:
        if name not in self.listing.names:
            raise ModelNotFound(f"{self.source.repository} has no file {name}", hint=_ggufs(self.listing))
        file = self._file(name)
        self._say_and_check_room([file])
        return self.fetcher.fetch(file)

    def whole_folder(self, aside: Path) -> Path:
        """Small files and headers first: a model that can't be used is refused before its weights come."""
        if CONFIG_FILE not in self.listing.names:
            raise UnsupportedModel(f"{self.source.repository} has no config.json", hint=_ggufs(self.listing))
        model = RemoteModel(aside, self.source.repository)
        model.add(self.fetcher.fetch(self._file(CONFIG_FILE)))
        model.check_config()
        _refuse_without_safetensors(self.source, self.listing)
        top = [name for name in self.listing.names if "/" not in name and name.endswith(_SMALL_SUFFIXES)]
        for path in self.fetcher.each(self.fetcher.fetch, [self._file(name) for name in top]):
            if path.name == INDEX_FILE:
                model.add(path)
        weights = [self._file(name) for name in model.choose(self.listing.names)]
        self.fetcher.each(lambda file: self._header(model, file), weights)
        model.check({file.name: file.num_bytes for file in weights})
        self._say_and_check_room(weights)
        for file in weights:
            try:
                self.fetcher.fetch(file, model.start(file.name))
            except WrongBytes:
                model.forget(file.name)  # It may have been the beginning that was wrong.
                raise
        return self.place.snapshot

    def _file(self, name: str) -> HubFile:
        return self.hub.file(self.source, self.listing, name)

    def _header(self, model: RemoteModel, file: HubFile) -> bytes:
        here = self.place.find(file)
        if here is None:
            return model.read_header(
                file.name, file.num_bytes, lambda count: self.fetcher.transfer.start_of(file, count)
            )

        def from_disk(count: int) -> bytes:
            with here.open("rb") as stream:
                return stream.read(count)

        return model.read_header(file.name, file.num_bytes, from_disk)

    def _say_and_check_room(self, files: list[HubFile]) -> None:
        """Before the large files come: how much of them is lacking, and whether the disk has room for it."""
        lacking = [file for file in files if self.place.find(file) is None]
        to_come = sum(self.fetcher.lacking_bytes(file) for file in lacking)
        total = sum(file.num_bytes for file in files)
        require_space(self.place.folder, to_come, self.source.text, setting="HF_HOME")
        says = f"{self.source.text}: {len(files)} file{'s' * (len(files) != 1)} of weights, {_mb(total)}; " + (
            f"{_mb(to_come)} to fetch" if to_come else "all here already"
        )
        self.fetcher.expect(sum(file.num_bytes for file in lacking))
        self.progress(PullProgress(stage="download", done=0, total=self.fetcher.total_bytes, says=says))


def _from_cache(source: HubSource, hub: Hub) -> Path:
    """The newest snapshot of that revision in the cache, if it is whole. Raises DownloadFailed."""
    from huggingface_hub import try_to_load_from_cache

    first = source.file or CONFIG_FILE
    found = try_to_load_from_cache(source.repository, first, cache_dir=hub.cache, revision=source.revision)
    if not isinstance(found, str):
        raise _not_offline(source, f"its {first} is not in the hub's cache in {hub.cache}")
    path = Path(found)
    if source.file is not None:
        return path
    try:
        weight_files(path.parent)
    except (BadCheckpoint, UnsupportedModel) as error:
        raise _not_offline(source, f"the hub's cache has only a part of it: {error.message}") from error
    return path.parent


def _not_offline(source: HubSource, why: str) -> PotluckError:
    return DownloadFailed(
        f"{source.text} can't be had offline: {why}",
        hint="pull it once with a network: without --offline, and with HF_HUB_OFFLINE not set",
    )


def _refuse_without_safetensors(source: HubSource, listing: Listing) -> None:
    if any(name.endswith(".safetensors") and "/" not in name for name in listing.names):
        return
    if any(name.endswith((".bin", ".pth", ".pt")) for name in listing.names):
        raise UnsupportedModel(
            f"{source.repository} has no safetensors weights, only pickled ones (.bin, .pth), which can run code",
            hint=_ggufs(listing),
        )
    raise UnsupportedModel(f"{source.repository} has no safetensors weights", hint=_ggufs(listing))


def _ggufs(listing: Listing) -> str:
    ggufs = [name for name in listing.names if name.endswith(".gguf")]
    if ggufs:
        return f"name one of its GGUF files: hf:{listing.repository}/{ggufs[0]}"
    return "it has no GGUF file either: take another repository of the model"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 10e6 else f"{count / 1e6:,.0f} MB"
