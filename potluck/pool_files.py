"""Whole files that other hosts of the pool have, for pulls on the head's host: they are not downloaded again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import zmq

from devices.identity import load_keys
from potluck.head_api import post_to_head
from potluck.head_file import running_head
from potluck.paths import identity_dir
from potluck.pool_offers import FileHolder, FileHolders
from transport.curve import Curve, KeyPair
from transport.errors import BadMessage, DownloadFailed, NotRunning, PotluckError
from transport.pieces.messages import PART_BYTES, Ask, Missing, Part, Refused
from transport.pieces.peer_line import PeerLine
from transport.pool_messages import PiecePeer

_BLOCK_WITHIN_S = 10.0
"""Who takes longer for a megabyte is no better than the internet."""

_ASK_HEAD_S = 8.0
_TICK_S = 0.05


AskHolders = Callable[[str], list[FileHolder]]


class PoolFiles:
    """Implements `PeerFiles`. `holders` says who has a file; `keys` are this host's, whom the hosts of its pool let in.

    Each thread has a connection of its own, to another host than the next one's where several have the file.
    """

    def __init__(self, holders: AskHolders, keys: KeyPair) -> None:
        self._ask_holders = holders
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._curve = Curve(self._context, keys)
        self._holders: dict[str, list[FileHolder]] = {}
        self._lock = threading.Lock()
        self._own = threading.local()
        self._lines: list[PeerLine] = []
        self._num_threads = 0
        self.bytes_by_host: Counter[str] = Counter()
        """What came from whom, be it right or not."""

    def holds(self, sha256: str) -> bool:
        with self._lock:
            if sha256 not in self._holders:
                self._holders[sha256] = self._ask_holders(sha256)
            return bool(self._holders[sha256])

    def read(self, sha256: str, offset: int, out: memoryview) -> None:
        """Raises DownloadFailed once no host is left that gives it in time."""
        problem = "no host has it"
        while True:
            with self._lock:
                holders = list(self._holders.get(sha256, ()))
            if not holders:
                raise DownloadFailed(f"the pool does not give file {sha256[:12]}: {problem}")
            holder = holders[self._number() % len(holders)]
            try:
                self._read_from(holder, sha256, offset, out)
            except PotluckError as error:
                problem = f"{holder.name}: {error.message}"
                self._drop(sha256, holder)
                continue
            with self._lock:
                self.bytes_by_host[holder.name] += len(out)
            return

    def close(self) -> None:
        """After the last thread that reads has ended."""
        for line in self._lines:
            line.close()
        self._curve.close()
        self._context.destroy(0)

    def _number(self) -> int:
        """Of this thread."""
        if not hasattr(self._own, "number"):
            with self._lock:
                self._own.number, self._own.lines = self._num_threads, {}
                self._num_threads += 1
        number: int = self._own.number
        return number

    def _line_to(self, holder: FileHolder) -> PeerLine:
        lines: dict[str, PeerLine] = self._own.lines
        line = lines.get(holder.key)
        if line is None:
            line = PeerLine(self._context, PiecePeer(holder.name, holder.endpoint, holder.key), self._curve)
            lines[holder.key] = line
            with self._lock:
                self._lines.append(line)
        return line

    def _drop(self, sha256: str, holder: FileHolder) -> None:
        """It is asked for this file no more, and on another connection for others."""
        with self._lock:
            with suppress(ValueError):
                self._holders[sha256].remove(holder)
            line = self._own.lines.pop(holder.key, None)
            if line is not None:
                self._lines.remove(line)
        if line is not None:
            line.close()

    def _read_from(self, holder: FileHolder, sha256: str, offset: int, out: memoryview) -> None:
        line = self._line_to(holder)
        late_at_s = time.monotonic() + _BLOCK_WITHIN_S
        asks = [
            Ask(number, sha256, offset + first, min(PART_BYTES, len(out) - first))
            for number, first in enumerate(range(0, len(out), PART_BYTES))
        ]
        waiting = {ask.token: ask for ask in asks}
        while waiting:
            if time.monotonic() >= late_at_s:
                raise DownloadFailed(f"it took more than {_BLOCK_WITHIN_S:.0f} s for {len(out):,} bytes")
            line.look()
            if line.lost:
                raise DownloadFailed(line.lost)
            while asks and line.is_open and line.send(asks[0]):
                del asks[0]
            zmq.zmq_poll([(line.socket, zmq.POLLIN), (line.monitor, zmq.POLLIN)], int(_TICK_S * 1000))
            for answer, buffer in line.received():
                match answer:
                    case Part(token=token, digest=digest, offset=at):
                        ask = waiting.pop(token, None)
                        if ask is None or (digest, at, len(buffer)) != (sha256, ask.offset, ask.num_bytes):
                            raise BadMessage("it sent another part than was asked for")
                        first = ask.offset - offset
                        out[first : first + ask.num_bytes] = buffer
                    case Missing():
                        raise DownloadFailed("it does not have the file any more")
                    case Refused(reason=reason):
                        raise DownloadFailed(f"it refused: {reason!r}")
                    case _:
                        raise BadMessage("it sent what was not asked for")


@contextmanager
def files_of_the_pool() -> Iterator[PoolFiles | None]:
    """Those of the pool whose head runs on this host; None where none does, or none that lets other hosts in."""
    try:
        is_open = running_head().pieces is not None
    except NotRunning:
        is_open = False
    if not is_open:
        yield None
        return
    files = PoolFiles(_holders_by_the_head, load_keys(identity_dir()))
    try:
        yield files
    finally:
        files.close()


def _holders_by_the_head(sha256: str) -> list[FileHolder]:
    try:
        return post_to_head("/potluck/files", {"sha256": sha256}, FileHolders, timeout_s=_ASK_HEAD_S).holders
    except PotluckError:  # No head, or one that is busy: then the file comes from where it would otherwise.
        return []
