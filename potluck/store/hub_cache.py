"""The hub's cache on this host, which other tools use too: whole files only, where they look for them.

Layout, meant for any program: the page "Local cache" of the hub's documentation. A file lies under its checksum in
`blobs`, `snapshots/COMMIT` links to it by name, and `refs` says which commit a branch was last.
"""

from __future__ import annotations

import os
import secrets
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from potluck.store.disk import FULL, translated_write_errors
from potluck.store.hub_files import HubFile


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
        """The file in this snapshot, linked there now if another commit has it; None if it is not here whole."""
        path = self.snapshot / file.name
        if _is_whole(path, file):
            return path
        if not _is_whole(self._blob(file), file):
            return None
        return self._link(file)

    def find_elsewhere(self, file: HubFile) -> list[Path]:
        """Files of other repositories that have the same name by checksum and the same size."""
        if file.sha256 is None:
            return []
        found = self.cache.glob(f"models--*/blobs/{file.checksum}")
        return [path for path in found if path.parent.parent != self.folder and _is_whole(path, file)]

    def adopt(self, file: HubFile, whole: Path) -> Path:
        """Move `whole`, in the blobs' folder and checked, into its place; its path in the snapshot."""
        whole.replace(self._blob(file))
        return self._link(file)

    def note_revision(self, revision: str | None) -> None:
        """Once all files are here: offline, the branch means this commit."""
        revision = revision or "main"
        if revision == self.commit:
            return
        path = self.folder / "refs" / revision
        if path.is_file() and path.read_text() == self.commit:
            return
        with self._translated(f"refs/{revision}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}.new")
            new.write_text(self.commit)
            new.replace(path)

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
                if error.errno in FULL:
                    raise
                # As the hub's client does where links are not allowed (Windows): the snapshot has the file itself.
                blob.replace(path)
                return path
            new.replace(path)
        return path

    def _translated(self, name: str) -> AbstractContextManager[None]:
        return translated_write_errors(self.cache, f"{self.repository}: {name}", setting="HF_HOME")


def _is_whole(path: Path, file: HubFile) -> bool:
    try:
        return path.is_file() and path.stat().st_size == file.num_bytes
    except OSError:
        return False
