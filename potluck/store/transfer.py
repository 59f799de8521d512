"""Bytes of a hub's files into partial files: several segments at once, again and again while something comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from potluck.store.hub_files import HubFile
from potluck.store.range_client import CONNECTIONS, Interrupted, NoRanges, RangeClient
from potluck.store.segments import PartialFile, Segment
from transport.errors import DownloadFailed

_T = TypeVar("_T")
# Waits before the next try; the count starts again whenever something new has come.
WAITS_S = (0.2, 1.0, 3.0)


class Stopped(Exception):
    """Another thread of the same pull failed, or the user ended it."""


class Transfer:
    """`count` is told of bytes as they come. Its threads end with `close`."""

    def __init__(self, client: RangeClient, url: Callable[[str], str], count: Callable[[int], None]) -> None:
        self._client = client
        self._url = url
        self._count = count
        self._segments = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="pull-segment")
        self._stopping = threading.Event()
        self._has_ranges = True

    def stop(self) -> None:
        """What is under way ends within a read's deadline, with Stopped."""
        self._stopping.set()

    def close(self) -> None:
        self.stop()
        self._segments.shutdown(wait=True, cancel_futures=True)

    def start_of(self, file: HubFile, count: int) -> bytes:
        """The file's first `count` bytes, from the hub. Raises PotluckError."""
        start = b""

        def go_on() -> bool:
            nonlocal start
            start = self._client.read_on(self._url(file.name), start, count, file.num_bytes)
            return len(start) == count

        self._persist(file, go_on, lambda: len(start))
        return start

    def fetch(self, file: HubFile, partial: PartialFile) -> None:
        """All that lacks. Raises PotluckError; what came stays."""
        url = self._url(file.name)
        if self._has_ranges:
            try:
                self.each_segment(lambda segment: self._segment(url, file, partial, segment), partial)
                return
            except NoRanges:
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
                    self.check_going_on(partial)
                    partial.write(segment.index, block[: segment.end - first])
                    first += len(block)
                    self._count(len(block))
                    if first >= segment.end:
                        break
            return first >= segment.end

        self._persist(file, go_on, lambda: first)

    def _from_the_beginning(self, url: str, file: HubFile, partial: PartialFile) -> None:
        """From a server without ranges: what is here already comes again, and is passed over."""

        def go_on() -> bool:
            offset = 0
            with self._client.stream(url, 0, file.num_bytes, file.num_bytes) as blocks:
                for block in blocks:
                    self.check_going_on(partial)
                    self._count(partial.write_at(offset, block))
                    offset += len(block)
            return not partial.missing()

        self._persist(file, go_on, lambda: partial.here_bytes)

    def _persist(self, file: HubFile, go_on: Callable[[], bool], position: Callable[[], int]) -> None:
        """Until `go_on` says that all is here; not for ever where nothing new comes."""
        tries = 0
        while True:
            before, wait_s = position(), 0.0
            try:
                if go_on():
                    return
                why = "the connection closed early"
            except Interrupted as error:
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
            raise Stopped

    def check_going_on(self, partial: PartialFile) -> None:
        """For those who write to it. Raises Stopped."""
        if self._stopping.is_set() or partial.is_halted:
            raise Stopped


def raise_first(futures: Sequence[Future[_T]]) -> None:
    """Wait for all, or raise what the first one raises that fails."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        if (error := future.exception()) is not None:
            raise error
