"""A file that comes in segments, several at once, and survives a kill at any time.

Beside the data lies a journal that says how far each segment has come; a line is written only after the bytes that it
tells of. What a power cut may have torn, the file's checksum shows.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def discard(self) -> None:
        self.close()
        discard_partial(self.path)

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
