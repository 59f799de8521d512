"""A transfer reads byte ranges over HTTP, several segments at once, and retries while something comes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import httpx

from potluck.store.hub.partial_file import PartialFile, Segment
from potluck.store.hub.repository import HubFile, gated_error
from transport.errors import DownloadFailed, ModelNotFound, PotluckError

NUM_CONNECTIONS = 4
_TIMEOUT = httpx.Timeout(10.0, connect=15.0, pool=None)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_LONGEST_WAIT_S = 30.0


class RangesUnsupported(Exception):
    """The server sends whole files only."""


class TransferInterrupted(Exception):
    """It did not work this time. `wait_s`: how long the server asks to be left alone."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class RangeClient:
    """One pool of connections for all threads. `headers` may hold a token: only `endpoint`'s own host gets it."""

    def __init__(self, repository: str, headers: dict[str, str]) -> None:
        # Compression would make the ranges those of another file.
        self._headers = headers | {"Accept-Encoding": "identity"}
        self._repository = repository
        limits = httpx.Limits(max_connections=NUM_CONNECTIONS, max_keepalive_connections=NUM_CONNECTIONS)
        # httpx takes the authorization off where a redirect leads to another scheme, host or port.
        self._client = httpx.Client(timeout=_TIMEOUT, follow_redirects=True, limits=limits)

    def __enter__(self) -> RangeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    @contextmanager
    def stream(self, url: str, first: int, end: int, num_bytes: int) -> Iterator[Iterator[bytes]]:
        """Bytes [first, end) of the file of `num_bytes` at `url`, as they come: they may end early.

        Raises NoRanges, Interrupted for what may work the next time, PotluckError for what will not.
        """
        is_whole = first == 0 and end == num_bytes
        headers = self._headers if is_whole else self._headers | {"Range": f"bytes={first}-{end - 1}"}
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                self._check(response, url)
                if is_whole:
                    _check_length(response, response.headers.get("Content-Length"), num_bytes)
                else:
                    _check_range(response, first, end, num_bytes)
                yield response.iter_raw()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TransferInterrupted(str(error) or type(error).__name__) from error

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
            f"{response.url.path} has {said} bytes, but the hub's list says {num_bytes:,}",
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
    """`count` is told of bytes as they come. Its threads end with `close`."""

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

        self._retry(file, go_on, lambda: len(start))
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

        self._retry(file, go_on, lambda: first)

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

        self._retry(file, go_on, lambda: partial.present_bytes)

    def _retry(self, file: HubFile, go_on: Callable[[], bool], position: Callable[[], int]) -> None:
        """Until `go_on` says that all is here; not for ever where nothing new comes."""
        tries = 0
        while True:
            before, wait_s = position(), 0.0
            try:
                if go_on():
                    return
                why = "the connection closed early"
            except TransferInterrupted as error:
                why, wait_s = str(error), error.wait_s
            tries = 0 if position() > before else tries + 1
            if tries > len(WAITS_S):
                raise DownloadFailed(
                    f"downloading {file.name} failed: {why}; what came is kept",
                    hint="check the connection and pull again: it continues where it stopped",
                )
            self._wait(max(wait_s, WAITS_S[max(tries - 1, 0)]))

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise TransferStopped

    def raise_if_stopped(self, partial: PartialFile) -> None:
        """For those who write to it. Raises Stopped."""
        if self._stopping.is_set() or partial.is_halted:
            raise TransferStopped


def raise_first(futures: Sequence[Future[_T]]) -> None:
    """Wait for all, or raise what the first one raises that fails."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        if (error := future.exception()) is not None:
            raise error
