"""A transfer reads byte ranges over HTTP, several segments at once, and retries while something comes.

Beside a partial file lies a journal that says how far each segment has come; a line is written only after the bytes
that it counts, so that a kill at any time does no harm. What a power cut may have torn, the file's checksum shows.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx

from potluck.store.hub_repository import HubFile, gated_error
from transport.errors import DownloadFailed, ModelNotFound, PotluckError

SEGMENT_BYTES = 32 << 20
_JOURNAL_EVERY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Bytes [first, end) of a file are yet to come, the last ones of segment `index`."""

    index: int
    first: int
    end: int


class PartialFile:
    """`num_bytes` of a file at `path`, as far as they are here. Several threads may write, each its own segment."""

    def __init__(self, path: Path, num_bytes: int, segment_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self.is_halted = False  # Said to those who write.
        self._done = _read_journal(path, num_bytes, segment_bytes)
        self._journaled = list(self._done)
        is_new = not any(self._done)
        self._data: BinaryIO = path.open("w+b" if is_new else "r+b", buffering=0)
        self._journal: BinaryIO = journal_of(path).open("wb" if is_new else "ab", buffering=0)
        if is_new:
            self._journal.write(_heading(num_bytes, segment_bytes) + b"\n")

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def present_bytes(self) -> int:
        return sum(self._done)

    def missing(self) -> list[Segment]:
        found = []
        for index, done in enumerate(self._done):
            start = index * self._segment_bytes
            end = min(start + self._segment_bytes, self.num_bytes)
            if start + done < end:
                found.append(Segment(index=index, first=start + done, end=end))
        return found

    def write(self, segment: int, block: bytes | memoryview) -> None:
        """Append to what is there of that segment."""
        with self._lock:
            start = segment * self._segment_bytes
            room = min(self._segment_bytes, self.num_bytes - start) - self._done[segment]
            if len(block) > room:
                raise ValueError(f"{len(block)} bytes do not fit into segment {segment}, which lacks {room}")
            self._data.seek(start + self._done[segment])
            rest = memoryview(block)
            while rest:
                rest = rest[self._data.write(rest) :]
            self._done[segment] += len(block)
            if self._done[segment] - self._journaled[segment] >= _JOURNAL_EVERY_BYTES or len(block) == room:
                self._write_journal(segment)

    def write_at(self, offset: int, block: bytes) -> int:
        """Of bytes [offset, offset + len(block)) of the file, write those that come next in a segment; how many."""
        written, end = 0, min(offset + len(block), self.num_bytes)
        for segment in range(offset // self._segment_bytes, -(-end // self._segment_bytes)):
            start = segment * self._segment_bytes
            position, last = start + self._done[segment], min(end, start + self._segment_bytes)
            if offset <= position < last:
                self.write(segment, block[position - offset : last - offset])
                written += last - position
        return written

    def seed(self, start: bytes) -> None:
        """What is known of the file's beginning, if nothing is here yet."""
        if not self.present_bytes:
            self.write(0, start[: min(self._segment_bytes, self.num_bytes)])

    def close(self) -> None:
        with self._lock:
            if self._data.closed:
                return
            for segment in range(len(self._done)):
                self._write_journal(segment)
            self._data.close()
            self._journal.close()

    def _write_journal(self, segment: int) -> None:
        if self._done[segment] != self._journaled[segment]:
            self._journal.write(b"%d %d\n" % (segment, self._done[segment]))
            self._journaled[segment] = self._done[segment]


def present_bytes(path: Path, num_bytes: int, segment_bytes: int) -> int:
    """How much of the file is in the partial file at `path`."""
    return sum(_read_journal(path, num_bytes, segment_bytes))


def journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.incomplete')}.journal.incomplete")


def discard_partial(path: Path) -> None:
    path.unlink(missing_ok=True)
    journal_of(path).unlink(missing_ok=True)


def _heading(num_bytes: int, segment_bytes: int) -> bytes:
    return b"potluck 1 %d %d" % (num_bytes, segment_bytes)


def _read_journal(path: Path, num_bytes: int, segment_bytes: int) -> list[int]:
    """Bytes here of each segment: none if journal and data do not belong together."""
    nothing = [0] * max(1, -(-num_bytes // segment_bytes))
    try:
        lines = journal_of(path).read_bytes().split(b"\n")
        size = path.stat().st_size
    except OSError:
        return nothing
    if lines[0] != _heading(num_bytes, segment_bytes):
        return nothing
    done = list(nothing)
    for line in lines[1:-1]:  # After the last newline: nothing, or what a kill has cut.
        segment, _, count = line.partition(b" ")
        if not segment.isdigit() or not count.isdigit() or int(segment) >= len(done):
            return nothing
        done[int(segment)] = int(count)
    for index, here in enumerate(done):
        start = index * segment_bytes
        if here > min(segment_bytes, num_bytes - start) or (here and start + here > size):
            return nothing
    return done


NUM_CONNECTIONS = 4
HTTP_TIMEOUT = httpx.Timeout(10.0, connect=15.0, pool=None)
# Compression would make the ranges those of another file.
UNCOMPRESSED = {"Accept-Encoding": "identity"}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_LONGEST_WAIT_S = 30.0


class RangesUnsupported(Exception):
    """The server sends complete files only."""


class TransferInterrupted(Exception):
    """It did not work this time. `wait_s`: how long the server asks to be left alone."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class RangeClient:
    """One pool of connections for all threads. `headers` may hold a token: only `endpoint`'s own host gets it."""

    def __init__(self, repository: str, headers: dict[str, str]) -> None:
        self._headers = headers | UNCOMPRESSED
        self._repository = repository
        limits = httpx.Limits(max_connections=NUM_CONNECTIONS, max_keepalive_connections=NUM_CONNECTIONS)
        # httpx takes the authorization off where a redirect leads to another scheme, host or port.
        self._client = httpx.Client(timeout=HTTP_TIMEOUT, follow_redirects=True, limits=limits)

    def __enter__(self) -> RangeClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    @contextmanager
    def stream(self, url: str, first: int, end: int, num_bytes: int) -> Iterator[Iterator[bytes]]:
        """Bytes [first, end) of the file of `num_bytes` at `url`, as they come: they may end early.

        Raises RangesUnsupported, TransferInterrupted and httpx's errors for what may work the next time, PotluckError
        for what will not.
        """
        is_whole = first == 0 and end == num_bytes
        headers = self._headers if is_whole else self._headers | {"Range": f"bytes={first}-{end - 1}"}
        with self._client.stream("GET", url, headers=headers) as response:
            self._check(response, url)
            if is_whole:
                _check_length(response, response.headers.get("Content-Length"), num_bytes)
            else:
                _check_range(response, first, end, num_bytes)
            yield response.iter_raw()

    def continue_start(self, url: str, start: bytes, count: int, num_bytes: int) -> bytes:
        """The file's first `count` bytes, of which `start` is known: all, or those that came before the connection
        ended. Works without ranges too."""
        try:
            with self.stream(url, len(start), count, num_bytes) as blocks:
                return _read_up_to(start, blocks, count)
        except RangesUnsupported:
            with self.stream(url, 0, num_bytes, num_bytes) as blocks:
                return _read_up_to(b"", blocks, count)

    def _check(self, response: httpx.Response, url: str) -> None:
        """By the hub's own words where it says them (the header X-Error-Code)."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if status in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            return
        name = url.rsplit("/", 1)[-1]
        if status in (408, 429) or status >= 500:
            raise TransferInterrupted(f"HTTP {status}", _wait_s(response))
        raise self._refusal(status, code, name)

    def _refusal(self, status: int, code: str, name: str) -> PotluckError:
        if code == "GatedRepo":
            return gated_error(self._repository)
        if code in ("EntryNotFound", "RevisionNotFound", "RepoNotFound") or status == httpx.codes.NOT_FOUND:
            return ModelNotFound(
                f"{self._repository} has no {name} any more (HTTP {status})",
                hint="the repository changed while it was downloaded: pull again",
            )
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return DownloadFailed(
                f"{self._repository}: {name} is refused (HTTP {status})",
                hint="set HF_TOKEN to a token that may read it, or run hf auth login; then pull again",
            )
        return DownloadFailed(
            f"{self._repository}: {name} can't be downloaded (HTTP {status})", hint="check HF_ENDPOINT, or try later"
        )


def _check_range(response: httpx.Response, first: int, end: int, num_bytes: int) -> None:
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        raise RangesUnsupported
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or (int(match[1]), int(match[2])) != (first, end - 1):
        raise RangesUnsupported
    _check_length(response, match[3], num_bytes)


def _check_length(response: httpx.Response, said: str | None, num_bytes: int) -> None:
    if said not in (None, "*", str(num_bytes)):
        raise DownloadFailed(
            f"{response.url.path}: expected {num_bytes:,} bytes as in the hub's list, got {said}",
            hint="pull again; if it happens twice, the file was changed at its source",
        )


def _read_up_to(start: bytes, blocks: Iterator[bytes], count: int) -> bytes:
    taken = bytearray(start)
    try:
        for block in blocks:
            taken += block[: count - len(taken)]
            if len(taken) >= count:
                break
    except httpx.HTTPError:
        if len(taken) == len(start):
            raise
    return bytes(taken)


def _wait_s(response: httpx.Response) -> float:
    said = response.headers.get("Retry-After", "")
    return min(float(said), _LONGEST_WAIT_S) if said.isdigit() else 0.0


_T = TypeVar("_T")
# Waits before the next try; the count starts again whenever something new has come.
WAITS_S = (0.2, 1.0, 3.0)


class TransferStopped(Exception):
    """Another thread of the same pull failed, or the user ended it."""


class Transfer:
    """`count` takes the number of bytes as they come. Its threads end with `close`."""

    def __init__(self, client: RangeClient, url: Callable[[str], str], count: Callable[[int], None]) -> None:
        self._client = client
        self._url = url
        self._count = count
        self._segments = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="pull-segment")
        self._stopping = threading.Event()
        self._has_ranges = True

    def stop(self) -> None:
        """What is under way ends within a read's deadline, with Stopped."""
        self._stopping.set()

    def close(self) -> None:
        self.stop()
        self._segments.shutdown(wait=True, cancel_futures=True)

    def read_start(self, file: HubFile, count: int) -> bytes:
        """The file's first `count` bytes, from the hub. Raises PotluckError."""
        start = b""

        def go_on() -> bool:
            nonlocal start
            start = self._client.continue_start(self._url(file.name), start, count, file.num_bytes)
            return len(start) == count

        retry(file.name, go_on, lambda: len(start), self._wait)
        return start

    def fetch(self, file: HubFile, partial: PartialFile) -> None:
        """All that lacks. Raises PotluckError; what came stays."""
        url = self._url(file.name)
        if self._has_ranges:
            try:
                self.each_segment(lambda segment: self._segment(url, file, partial, segment), partial)
                return
            except RangesUnsupported:
                self._has_ranges = False
        self._from_the_beginning(url, file, partial)

    def each_segment(self, act: Callable[[Segment], None], partial: PartialFile) -> None:
        """Several at once. When one fails, the others end before its error is raised."""
        missing = partial.missing()
        if len(missing) == 1:
            act(missing[0])
            return
        futures = [self._segments.submit(act, segment) for segment in missing]
        try:
            raise_first(futures)
        finally:
            partial.is_halted = True
            for future in futures:
                future.cancel()
            wait(futures)
            partial.is_halted = False

    def _segment(self, url: str, file: HubFile, partial: PartialFile, segment: Segment) -> None:
        first = segment.first

        def go_on() -> bool:
            nonlocal first
            with self._client.stream(url, first, segment.end, file.num_bytes) as blocks:
                for block in blocks:
                    self.raise_if_stopped(partial)
                    partial.write(segment.index, block[: segment.end - first])
                    first += len(block)
                    self._count(len(block))
                    if first >= segment.end:
                        break
            return first >= segment.end

        retry(file.name, go_on, lambda: first, self._wait)

    def _from_the_beginning(self, url: str, file: HubFile, partial: PartialFile) -> None:
        """From a server without ranges: what is here already comes again, and is passed over."""

        def go_on() -> bool:
            offset = 0
            with self._client.stream(url, 0, file.num_bytes, file.num_bytes) as blocks:
                for block in blocks:
                    self.raise_if_stopped(partial)
                    self._count(partial.write_at(offset, block))
                    offset += len(block)
            return not partial.missing()

        retry(file.name, go_on, lambda: partial.present_bytes, self._wait)

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise TransferStopped

    def raise_if_stopped(self, partial: PartialFile) -> None:
        """For those who write to it. Raises Stopped."""
        if self._stopping.is_set() or partial.is_halted:
            raise TransferStopped


def retry(what: str, go_on: Callable[[], bool], position: Callable[[], int], wait: Callable[[float], None]) -> None:
    """Until `go_on` says that all is here. Raises DownloadFailed where nothing new comes for some tries."""
    tries = 0
    while True:
        before, wait_s = position(), 0.0
        try:
            if go_on():
                return
            why = "the connection closed early"
        except TransferInterrupted as error:
            why, wait_s = str(error), error.wait_s
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
        tries = 0 if position() > before else tries + 1
        if tries > len(WAITS_S):
            raise DownloadFailed(
                f"downloading {what} failed: {why}; what came is kept",
                hint="check the connection and pull again: it continues where it stopped",
            )
        wait(max(wait_s, WAITS_S[max(tries - 1, 0)]))


def raise_first(futures: Sequence[Future[_T]]) -> None:
    """Wait for all, or raise what the first one raises that fails."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        if (error := future.exception()) is not None:
            raise error
