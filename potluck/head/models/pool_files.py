"""Pool files are whole files on other hosts, for pulls on the head's host: they are not downloaded again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import zmq

from devices.pairing.identity import load_keys
from potluck.head.client import post_to_head
from potluck.head.models.search import FileHolder, FileHolders
from potluck.host.local_head import running_head
from potluck.system.paths import identity_dir
from transport.errors import BadMessage, DownloadFailed, NotRunning, PotluckError
from transport.messages.pieces import PART_BYTES, PieceRequest
from transport.messages.pool import PiecePeer
from transport.pieces.client import PieceConnection
from transport.security.curve import Curve, KeyPair
from transport.timeouts import BLOCK_S, POOL_HEAD_S

FindHolders = Callable[[str], list[FileHolder]]


class PoolFiles:
    """Implements `PeerFiles`. `holders` says who has a file; `keys` are this host's, whom the hosts of its pool let in.

    Each thread has a connection of its own, to another host than the next one's where several have the file.
    """

    def __init__(self, holders: FindHolders, keys: KeyPair) -> None:
        self._find_holders = holders
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._curve = Curve(self._context, keys)
        self._holders: dict[str, list[FileHolder]] = {}
        self._lock = threading.Lock()
        self._per_thread = threading.local()
        self._connections: list[PieceConnection] = []
        self._num_threads = 0
        self.bytes_by_host: Counter[str] = Counter()
        """What came from whom, be it right or not."""

    def holds(self, sha256: str) -> bool:
        with self._lock:
            if sha256 not in self._holders:
                self._holders[sha256] = self._find_holders(sha256)
            return bool(self._holders[sha256])

    def read(self, sha256: str, offset: int, out: memoryview) -> None:
        """Raises DownloadFailed once no host is left that gives it in time."""
        problem = "no host has it"
        while True:
            with self._lock:
                holders = list(self._holders.get(sha256, ()))
            if not holders:
                raise DownloadFailed(f"the pool does not give file {sha256[:12]}: {problem}")
            holder = holders[self._thread_number() % len(holders)]
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
        for line in self._connections:
            line.close()
        self._curve.close()
        self._context.destroy(0)

    def _thread_number(self) -> int:
        """Of this thread."""
        if not hasattr(self._per_thread, "number"):
            with self._lock:
                self._per_thread.number, self._per_thread.lines = self._num_threads, {}
                self._num_threads += 1
        number: int = self._per_thread.number
        return number

    def _connection_to(self, holder: FileHolder) -> PieceConnection:
        lines: dict[str, PieceConnection] = self._per_thread.lines
        connection = lines.get(holder.key)
        if connection is None:
            connection = PieceConnection(
                self._context, PiecePeer(holder.name, holder.endpoint, holder.key), self._curve
            )
            lines[holder.key] = connection
            with self._lock:
                self._connections.append(connection)
        return connection

    def _drop(self, sha256: str, holder: FileHolder) -> None:
        """It is asked for this file no more, and on another connection for others."""
        with self._lock:
            with suppress(ValueError):
                self._holders[sha256].remove(holder)
            connection = self._per_thread.lines.pop(holder.key, None)
            if connection is not None:
                self._connections.remove(connection)
        if connection is not None:
            connection.close()

    def _read_from(self, holder: FileHolder, sha256: str, offset: int, out: memoryview) -> None:
        requests = {
            number: PieceRequest(number, sha256, offset + first, min(PART_BYTES, len(out) - first))
            for number, first in enumerate(range(0, len(out), PART_BYTES))
        }
        connection = self._connection_to(holder)
        ends_at_s = time.monotonic() + BLOCK_S
        for part, buffer in connection.exchange(requests.values(), silent_after_s=BLOCK_S, ends_at_s=ends_at_s):
            request = requests.pop(part.token, None)
            if request is None or (part.digest, part.offset, len(buffer)) != (
                sha256,
                request.offset,
                request.num_bytes,
            ):
                raise BadMessage("it sent another part than was asked for")
            first = request.offset - offset
            out[first : first + request.num_bytes] = buffer
            if not requests:
                return
        raise DownloadFailed(f"it took more than {BLOCK_S:.0f} s for {len(out):,} bytes")


@contextmanager
def open_pool_files() -> Iterator[PoolFiles | None]:
    """Those of the pool whose head runs on this host; None where none does, or none that lets other hosts in."""
    try:
        is_open = running_head().pieces is not None
    except NotRunning:
        is_open = False
    if not is_open:
        yield None
        return
    files = PoolFiles(_holders_from_head, load_keys(identity_dir()))
    try:
        yield files
    finally:
        files.close()


def _holders_from_head(sha256: str) -> list[FileHolder]:
    try:
        return post_to_head("/potluck/files", {"sha256": sha256}, FileHolders, timeout_s=POOL_HEAD_S).holders
    except PotluckError:  # No head, or one that is busy: then the file comes from where it would otherwise.
        return []
