"""A hub repository lists files with sizes and checksums, and keeps them in the hub's cache on this host."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.store.disk import DISK_FULL_ERRNOS, translated_write_errors
from potluck.store.sources import HubSource
from transport.errors import DownloadFailed, ModelNotFound, PotluckError
from transport.process.files import write_atomic

_TIMEOUT_S = 15.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._ +-]{0,199}/){0,4}[A-Za-z0-9][A-Za-z0-9._ +-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """`checksum` is what the hub's cache names the file by: 64 digits of SHA-256 for large files, 40 of git's id, a
    SHA-1 with the length before the content, for small ones."""

    name: str
    num_bytes: int
    checksum: str

    @property
    def sha256(self) -> str | None:
        return self.checksum if len(self.checksum) == 64 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryListing:
    """A repository as of one commit. `sizes` and `checksums` lack what the hub left out of its list."""

    repository: str
    commit: str
    names: tuple[str, ...]
    sizes: dict[str, int]
    checksums: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """HF_ENDPOINT, and where its client keeps files (HF_HUB_CACHE or HF_HOME)."""

    endpoint: str
    cache: Path

    @classmethod
    def from_environment(cls) -> Hub:
        # Its import takes half a second, which `potluck list` should not pay.
        from huggingface_hub import constants

        return cls(endpoint=constants.ENDPOINT, cache=Path(constants.HF_HUB_CACHE))

    def url(self, repository: str, commit: str, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(repository, name, revision=commit, endpoint=self.endpoint)

    def headers(self) -> dict[str, str]:
        """Who asks, and the user's token (HF_TOKEN, or what `hf auth login` kept)."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers: dict[str, str] = build_hf_headers(library_name="potluck")
        return headers

    def listing(self, source: HubSource) -> RepositoryListing:
        """Raises ModelNotFound, DownloadFailed."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # What all its errors come from.

        try:
            info = HfApi(endpoint=self.endpoint, library_name="potluck").model_info(
                source.repository, revision=source.revision, files_metadata=True, timeout=_TIMEOUT_S
            )
        except (HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._translated(source, error) from error
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise DownloadFailed(
                f"{self.endpoint}: expected a commit of {source.text}, got {info.sha!r}", hint="check HF_ENDPOINT"
            )
        siblings = [one for one in info.siblings or [] if _NAME.fullmatch(one.rfilename) and ".." not in one.rfilename]
        return RepositoryListing(
            repository=source.repository,
            commit=info.sha,
            names=tuple(one.rfilename for one in siblings),
            sizes={one.rfilename: one.size for one in siblings if isinstance(one.size, int) and one.size >= 0},
            checksums={one.rfilename: checksum for one in siblings if (checksum := _checksum_of(one)) is not None},
        )

    def file(self, source: HubSource, listing: RepositoryListing, name: str) -> HubFile:
        """What is known of one file; the hub is asked for what its listing left out. Raises PotluckError."""
        size, checksum = listing.sizes.get(name), listing.checksums.get(name)
        if size is None or checksum is None:
            size, checksum = self._file_metadata(source, self.url(listing.repository, listing.commit, name))
        return HubFile(name=name, num_bytes=size, checksum=checksum)

    def _file_metadata(self, source: HubSource, url: str) -> tuple[int, str]:
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            found = get_hf_file_metadata(url, timeout=_TIMEOUT_S, headers=self.headers())
        except (HTTPError, OSError, ValueError) as error:
            raise self._translated(source, error) from error
        etag = found.etag or ""
        if found.size is None or not (_SHA256.fullmatch(etag) or _COMMIT.fullmatch(etag)):
            raise DownloadFailed(
                f"{self.endpoint}: expected size and checksum of {url.rsplit('/', 1)[-1]}, got {found.size}, {etag!r}",
                hint="check HF_ENDPOINT",
            )
        return found.size, etag

    def _translated(self, source: HubSource, error: Exception) -> PotluckError:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError):
            return gated_error(source.repository)
        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            return ModelNotFound(
                f"the hub has no {source.text.removeprefix('hf:')}",
                hint="check the name; a private one needs HF_TOKEN",
            )
        return DownloadFailed(
            f"{source.text} can't be read from {self.endpoint}: {str(error) or type(error).__name__}",
            hint="check the network and HF_ENDPOINT; --offline takes what is in the hub's cache",
        )


def gated_error(repository: str) -> DownloadFailed:
    return DownloadFailed(
        f"{repository} is gated",
        hint="accept its terms on the hub, and set HF_TOKEN or run hf auth login",
    )


def _checksum_of(sibling: Any) -> str | None:
    """For a large file the listing has the checksum of its content, and git's id of the pointer to it."""
    lfs = getattr(sibling, "lfs", None)
    if lfs is not None:
        return lfs.sha256 if isinstance(lfs.sha256, str) and _SHA256.fullmatch(lfs.sha256) else None
    blob = getattr(sibling, "blob_id", None)
    return blob if isinstance(blob, str) and _COMMIT.fullmatch(blob) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedRepository:
    """One repository's folder in the cache, as of one commit."""

    cache: Path
    repository: str
    commit: str

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.repository.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit

    def partial(self, file: HubFile) -> Path:
        """Where the file is put together; a name that the hub's tools know as unfinished."""
        return self.folder / "blobs" / f"{file.checksum}.potluck.incomplete"

    def lock(self, file: HubFile) -> Path:
        """The lock that the hub's own client takes for that file."""
        return self.cache / ".locks" / self.folder.name / f"{file.checksum}.lock"

    def find(self, file: HubFile) -> Path | None:
        """The file in this snapshot, linked there now if another commit has it; None if it is not complete here."""
        path = self.snapshot / file.name
        if _is_complete(path, file):
            return path
        if not _is_complete(self._blob(file), file):
            return None
        return self._link(file)

    def find_elsewhere(self, file: HubFile) -> list[Path]:
        """Files of other repositories that have the same name by checksum and the same size."""
        if file.sha256 is None:
            return []
        found = self.cache.glob(f"models--*/blobs/{file.checksum}")
        return [path for path in found if path.parent.parent != self.folder and _is_complete(path, file)]

    def move_into_place(self, file: HubFile, complete: Path) -> Path:
        """Move `complete`, in the blobs' folder and checked, into its place; its path in the snapshot."""
        complete.replace(self._blob(file))
        return self._link(file)

    def write_ref(self, revision: str | None) -> None:
        """Once all files are here: offline, the branch means this commit."""
        revision = revision or "main"
        if revision == self.commit:
            return
        path = self.folder / "refs" / revision
        if path.is_file() and path.read_text() == self.commit:
            return
        with self._translated(f"refs/{revision}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self.commit.encode(), private=False)

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.checksum

    def _link(self, file: HubFile) -> Path:
        path, blob = self.snapshot / file.name, self._blob(file)
        with self._translated(file.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Put in place at once: another process may be doing the same.
            new = path.with_name(f".{secrets.token_hex(4)}.incomplete")
            try:
                new.symlink_to(os.path.relpath(blob, path.parent))
            except OSError as error:
                if error.errno in DISK_FULL_ERRNOS:
                    raise
                # As the hub's client does where links are not allowed (Windows): the snapshot has the file itself.
                blob.replace(path)
                return path
            new.replace(path)
        return path

    def _translated(self, name: str) -> AbstractContextManager[None]:
        return translated_write_errors(self.cache, f"{self.repository}: {name}", setting="HF_HOME")


def _is_complete(path: Path, file: HubFile) -> bool:
    try:
        return path.is_file() and path.stat().st_size == file.num_bytes
    except OSError:
        return False
