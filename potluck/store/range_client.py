"""Byte ranges of a hub's files over HTTP. Redirects to another host (a CDN) are followed without the user's token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import httpx

from potluck.store.hub_files import gated
from transport.errors import DownloadFailed, ModelNotFound, PotluckError

CONNECTIONS = 4
_TIMEOUT = httpx.Timeout(10.0, connect=15.0, pool=None)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_LONGEST_WAIT_S = 30.0


class NoRanges(Exception):
    """The server sends whole files only."""


class Interrupted(Exception):
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
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
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
            raise Interrupted(str(error) or type(error).__name__) from error

    def read_on(self, url: str, start: bytes, count: int, num_bytes: int) -> bytes:
        """The file's first `count` bytes, of which `start` is known: all, or those that came before the connection
        ended. Works without ranges too."""
        try:
            with self.stream(url, len(start), count, num_bytes) as blocks:
                return _taken(start, blocks, count)
        except NoRanges:
            with self.stream(url, 0, num_bytes, num_bytes) as blocks:
                return _taken(b"", blocks, count)

    def _check(self, response: httpx.Response, url: str) -> None:
        """By the hub's own words where it says them (the header X-Error-Code)."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if status in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            return
        name = url.rsplit("/", 1)[-1]
        if status in (408, 429) or status >= 500:
            raise Interrupted(f"HTTP {status}", _wait_s(response))
        raise self._refusal(status, code, name)

    def _refusal(self, status: int, code: str, name: str) -> PotluckError:
        if code == "GatedRepo":
            return gated(self._repository)
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
        raise NoRanges
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or (int(match[1]), int(match[2])) != (first, end - 1):
        raise NoRanges
    _check_length(response, match[3], num_bytes)


def _check_length(response: httpx.Response, said: str | None, num_bytes: int) -> None:
    if said not in (None, "*", str(num_bytes)):
        raise DownloadFailed(
            f"{response.url.path} has {said} bytes, but the hub's list says {num_bytes:,}",
            hint="pull again; if it happens twice, the file was changed at its source",
        )


def _taken(start: bytes, blocks: Iterator[bytes], count: int) -> bytes:
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
