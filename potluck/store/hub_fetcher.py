"""The fetcher gets a revision's files from this host, peers or the hub, and checks each one."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from potluck.store.disk import BLOCK_BYTES, hash_stream, locked, translated_write_errors
from potluck.store.hub_repository import CachedRepository, HubFile
from potluck.store.sources import PeerFiles, ProgressCallback, PullOptions, PullProgress, byte_counter, ignore_progress
from potluck.store.transfer import (
    NUM_CONNECTIONS,
    SEGMENT_BYTES,
    PartialFile,
    RangeClient,
    Segment,
    Transfer,
    discard_partial,
    journal_of,
    present_bytes,
    raise_first,
)
from transport.errors import PotluckError, WrongBytes

_T = TypeVar("_T")


class Fetcher:
    """Puts files into the cached repository. One pull's; its threads end with it."""

    def __init__(
        self,
        cached: CachedRepository,
        client: RangeClient,
        options: PullOptions,
        url: Callable[[str], str],
        progress: ProgressCallback,
    ) -> None:
        self._cached = cached
        self._options = options
        self._progress = progress
        # Not the segments' own pool: a file waits for its segments.
        self._files = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="pull-file")
        self.transfer = Transfer(client, url, self._count)
        self._counting = threading.Lock()
        self._segment_bytes = SEGMENT_BYTES
        self._done_bytes = 0
        self.total_bytes: int | None = None

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.transfer.stop()
        self._files.shutdown(wait=True, cancel_futures=True)
        self.transfer.close()

    def expect(self, num_bytes: int) -> None:
        """The files that are fetched from now on have so many bytes together, for progress."""
        with self._counting:
            self._done_bytes, self.total_bytes = 0, num_bytes

    def missing_bytes(self, file: HubFile) -> int:
        """What of a file that is not in its place has yet to come: less what an earlier pull has left; nothing if
        another model's file can be linked."""
        folder = next(path for path in (self._cached.folder, *self._cached.folder.parents) if path.exists())
        device = folder.stat().st_dev
        if any((found := _status(path)) is not None and found.st_dev == device for path in self._candidates(file)):
            return 0
        return file.num_bytes - present_bytes(self._cached.partial(file), file.num_bytes, self._segment_bytes)

    def fetch(self, file: HubFile, start: bytes = b"") -> Path:
        """The file's path in the snapshot. `start`: what is known of its beginning. Raises PotluckError;
        WrongBytes where its checksum is not what the hub says, and then nothing is kept of it."""
        what = f"{self._cached.repository}: {file.name}"
        if (found := self._cached.find(file)) is not None:
            return found
        with (
            translated_write_errors(self._cached.cache, what, setting="HF_HOME"),
            locked(self._cached.lock(file), self._report),
        ):
            found = self._cached.find(file)
            if found is not None:
                return found
            found = self._from_local_copy(file)
            if found is not None:
                self._count(file.num_bytes)
                return found
            path = self._cached.partial(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._from_peers(file, path):
                with PartialFile(path, file.num_bytes, self._segment_bytes) as partial:
                    partial.seed(start)
                    self._count(partial.present_bytes)
                    self.transfer.fetch(file, partial)
                if not self._checksum_matches(path, file):
                    discard_partial(path)
                    raise _wrong_checksum(what, file)
            journal_of(path).unlink(missing_ok=True)
            return self._cached.move_into_place(file, path)

    def map_files(self, act: Callable[[HubFile], _T], files: Sequence[HubFile]) -> list[_T]:
        """What `act` makes of each file, several at once. Raises what the first of them that fails raises."""
        futures = [self._files.submit(act, file) for file in files]
        try:
            raise_first(futures)
            return [future.result() for future in futures]
        except BaseException:
            self.transfer.stop()
            raise

    def _candidates(self, file: HubFile) -> list[Path]:
        """Files on this host that should be the same."""
        if file.sha256 is None:
            return []
        copies = [(path, _status(path)) for path in self._options.local_copies(file.sha256)]
        same = [path for path, found in copies if found is not None and found.st_size == file.num_bytes]
        return [*self._cached.find_elsewhere(file), *same]

    def _from_local_copy(self, file: HubFile) -> Path | None:
        """From another repository of the cache or another model of the store: linked if that can be, and checked."""
        path = self._cached.partial(file).with_suffix(".copy.incomplete")
        for candidate in self._candidates(file):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with suppress(OSError):
                _link_or_copy(candidate.resolve(), path)
                if self._checksum_matches(path, file):
                    discard_partial(self._cached.partial(file))
                    return self._cached.move_into_place(file, path)
        path.unlink(missing_ok=True)
        return None

    def _from_peers(self, file: HubFile, path: Path) -> bool:
        """Whether they gave what lacked, and all is right. What they gave stays if they stop; what is wrong goes."""
        peers, sha256 = self._options.peers, file.sha256
        if peers is None or sha256 is None or not _holds(peers, sha256):
            return False

        def take(segment: Segment) -> None:
            for offset in range(segment.first, segment.end, BLOCK_BYTES):
                self.transfer.raise_if_stopped(partial)
                block = memoryview(bytearray(min(BLOCK_BYTES, segment.end - offset)))
                peers.read(sha256, offset, block)
                partial.write(segment.index, block)
                self._count(len(block))

        with PartialFile(path, file.num_bytes, self._segment_bytes) as partial:
            self._count(partial.present_bytes)
            try:
                self.transfer.each_segment(take, partial)
            except PotluckError:
                self._count(-partial.present_bytes)
                return False
        if self._checksum_matches(path, file):
            return True
        discard_partial(path)
        self._count(-file.num_bytes)
        return False

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self._done_bytes += num_bytes
            self._progress(PullProgress(stage="download", done=self._done_bytes, total=self.total_bytes))

    def _report(self, event: PullProgress) -> None:
        with self._counting:
            self._progress(event)

    def _checksum_matches(self, path: Path, file: HubFile) -> bool:
        digest = hashlib.sha256() if file.sha256 is not None else hashlib.sha1(b"blob %d\0" % file.num_bytes)
        progress = self._report if file.num_bytes > BLOCK_BYTES else ignore_progress
        with path.open("rb") as stream:
            hash_stream(stream, digest, byte_counter(progress, "verify", file.num_bytes))
        return digest.hexdigest() == file.checksum


def _status(path: Path) -> os.stat_result | None:
    """None for what another process has removed meanwhile."""
    try:
        return path.stat()
    except OSError:
        return None


def _holds(peers: PeerFiles, sha256: str) -> bool:
    try:
        return peers.holds(sha256)
    except PotluckError:
        return False


def _wrong_checksum(what: str, file: HubFile) -> WrongBytes:
    return WrongBytes(
        f"{what} has the wrong checksum: expected {file.checksum}; what was downloaded of it is removed",
        hint="pull again; if it happens twice, the file was changed at its source",
    )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
