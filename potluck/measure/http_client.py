"""HTTP/1.1 for measuring: when which byte of an answer came, with as little work a chunk as can be.

The client shares its cores with what it measures. Nothing is parsed while an answer streams but the framing: arrivals
and bytes are kept, and `potluck.measure.endpoint` reads them afterwards. A token takes a quarter of the CPU time of
httpx.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

CONNECT_WITHIN_S = 10.0
_MAX_HEAD_BYTES = 64 * 2**10
_LOOK_EVERY_S = 0.5


class BadResponse(Exception):
    """What came is not HTTP/1.1."""


class ResponseReader:
    """Bytes as they arrive → status, headers, body, and `marks`: (length of the body so far, time of that arrival)."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.marks: list[tuple[int, float]] = []
        self.is_done = False
        self._buffer = bytearray()
        self._is_chunked = False
        self._left: int | None = None
        """Bytes of the body, or of the chunk with its line end, that are still to come; None: until the connection's
        end, or until the next chunk's length."""

    def feed(self, data: bytes, now_s: float) -> None:
        """Raises BadResponse."""
        self._buffer += data
        if self.status is None and not self._read_head():
            return
        before = len(self.body)
        if self._is_chunked:
            self._read_chunks()
        else:
            self._read_plain()
        if len(self.body) > before:
            self.marks.append((len(self.body), now_s))

    def end(self) -> None:
        """The connection ended, which is how a body without a length ends."""
        if self.status is not None and not self._is_chunked and self._left is None:
            self.is_done = True

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES or not b"HTTP/1."[: len(self._buffer)] == self._buffer[:7]:
                raise BadResponse("what came is not HTTP")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit()):
            raise BadResponse(f"an answer that begins with {first[:60]!r}")
        if code[0] == "1":
            return self._read_head()
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        self.status = int(code)
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if not self._is_chunked and length is not None:
            if not (length.isascii() and length.isdigit()):
                raise BadResponse(f"a content length of {length[:20]!r}")
            self._left = int(length)
        return True

    def _read_plain(self) -> None:
        taken = self._buffer if self._left is None else self._buffer[: self._left]
        self.body += taken
        if self._left is not None:
            self._left -= len(taken)
            self.is_done = self._left == 0
        self._buffer.clear()

    def _read_chunks(self) -> None:
        buffer = self._buffer
        while buffer and not self.is_done:
            if self._left is None:
                end = buffer.find(b"\r\n")
                if end < 0:
                    return
                try:
                    length = int(bytes(buffer[:end]).partition(b";")[0], 16)
                except ValueError as error:
                    raise BadResponse(f"a chunk of length {bytes(buffer[:20])!r}") from error
                del buffer[: end + 2]
                if length == 0:
                    self.is_done = True
                    return
                self._left = length + 2
            if len(buffer) < self._left:
                # The line end after the chunk is not the body's.
                text = min(len(buffer), self._left - 2)
                self.body += buffer[:text]
                del buffer[:text]
                self._left -= text
                return
            self.body += buffer[: self._left - 2]
            del buffer[: self._left]
            self._left = None


@dataclass(slots=True)
class HttpExchange:
    """One request and what came back. `started_s` is before the connection was made, `ended_s` at the last byte or when
    it was given up; `error` says why there is no whole answer, "" if there is one or none yet."""

    started_s: float = 0.0
    ended_s: float = 0.0
    error: str = ""
    reader: ResponseReader = field(default_factory=ResponseReader)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpPeer:
    """Where requests go: a resolved address, and TLS for `name` if there is a context."""

    address: str
    port: int
    name: str
    context: ssl.SSLContext | None = None

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
        host = f"[{self.name}]" if ":" in self.name else self.name
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode("latin-1") + body


class _Arrivals(asyncio.Protocol):
    def __init__(self, exchange: HttpExchange, finished: asyncio.Future[None]) -> None:
        self._exchange = exchange
        self._finished = finished
        self.last_s = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        reader = self._exchange.reader
        seen = len(reader.body)
        try:
            reader.feed(data, now_s)
        except BadResponse as error:
            self._exchange.error = str(error)
            self.finish()
        # A comment (": keepalive") says only that somebody is there.
        if reader.body[seen : seen + 1] != b":":
            self.last_s = now_s
        if reader.is_done:
            self.finish()

    def connection_lost(self, error: Exception | None) -> None:
        if self._finished.done():
            return
        reader = self._exchange.reader
        reader.end()
        if not reader.is_done and not self._exchange.error:
            self._exchange.error = "the connection broke off" + (f": {error}" if error else "")
        self.finish()

    def finish(self) -> None:
        if not self._finished.done():
            self._finished.set_result(None)


async def run_exchange(peer: HttpPeer, request: bytes, found: HttpExchange, *, silence_s: float) -> None:
    """Sends, and fills `found` until the answer is whole or `found.error` says why not; given up after `silence_s`
    without news. If this is cancelled, `found` has what came so far."""
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[None] = loop.create_future()
    arrivals = _Arrivals(found, finished)
    found.started_s = time.perf_counter()
    transport: asyncio.Transport | None = None
    try:
        connected, _ = await asyncio.wait_for(
            loop.create_connection(
                lambda: arrivals,
                peer.address,
                peer.port,
                ssl=peer.context,
                server_hostname=peer.name if peer.context else None,
            ),
            CONNECT_WITHIN_S,
        )
        transport = connected
        connected.write(request)
        arrivals.last_s = time.perf_counter()
        while not finished.done():
            await asyncio.wait([finished], timeout=min(_LOOK_EVERY_S, silence_s))
            if not finished.done() and time.perf_counter() - arrivals.last_s > silence_s:
                found.error = f"no news for {silence_s:g} s"
                arrivals.finish()
    except TimeoutError:
        found.error = f"no connection within {CONNECT_WITHIN_S:g} s"
    except OSError as error:
        # asyncio's own text says the address again, and no reason.
        found.error = f"no connection: {os.strerror(error.errno) if error.errno and error.errno > 0 else error}"
    finally:
        found.ended_s = time.perf_counter()
        arrivals.finish()
        if transport is not None:
            transport.abort()
