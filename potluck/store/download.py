"""One file over HTTP, resumable: what came before a cut connection or a kill is kept and continued."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import httpx

from potluck.store.disk import require_space, translated_write_errors
from potluck.store.progress import Progress, PullProgress
from transport.errors import DownloadFailed

_TIMEOUT = httpx.Timeout(30.0, connect=15.0)
_BLOCK_BYTES = 1 << 20
# Waits before the next try; the count starts again whenever something new has come.
_WAITS_S = (0.2, 1.0, 3.0)


class DownloadRefused(Exception):
    """The server gave us nothing at all. Another client may know a proxy, a password or a certificate that we don't."""


def download(url: str, partial: Path, *, extra_bytes: int, progress: Progress, what: str) -> None:
    """Fill `partial` with the file at `url`, from where it ends. `extra_bytes`: room needed besides, for unpacking.

    Raises NoSpace; DownloadRefused if nothing came at all; DownloadFailed when the connection fails again and again:
    the part that came stays.
    """
    tries = 0
    with httpx.Client(timeout=_TIMEOUT, follow_redirects=True) as client:
        while True:
            had_bytes = _size(partial)
            try:
                if _fetch(client, url, partial, extra_bytes, progress, what):
                    return
                why = "the connection closed early"
            except httpx.HTTPError as error:
                why = str(error) or type(error).__name__
            tries = 0 if _size(partial) > had_bytes else tries + 1
            if tries > len(_WAITS_S) and not _size(partial):
                raise DownloadRefused(why)
            if tries > len(_WAITS_S):
                raise DownloadFailed(
                    f"downloading {what} failed: {why}; {_size(partial):,} bytes are kept",
                    hint="check the connection and pull again: it continues where it stopped",
                )
            time.sleep(_WAITS_S[max(tries - 1, 0)])


def verify(file: Path, sha256: str, *, progress: Progress, what: str) -> None:
    """Raise DownloadFailed, with `file` removed, unless its SHA-256 is the one expected."""
    digest = hashlib.sha256()
    total = _size(file)
    done = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            progress(PullProgress(stage="verify", done=done, total=total))
    actual = digest.hexdigest()
    if actual != sha256:
        file.unlink()
        raise DownloadFailed(
            f"{what} has the wrong checksum: expected sha256 {sha256}, got {actual}; what was downloaded is removed",
            hint="pull again; if it happens twice, the file was changed at its source",
        )


def _fetch(client: httpx.Client, url: str, partial: Path, extra_bytes: int, progress: Progress, what: str) -> bool:
    """One request. True when the file is whole."""
    start = _size(partial)
    # Compression would make the ranges those of another file.
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"} if start else {"Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _is_all_there(response, partial, start)
        if response.is_client_error:
            raise DownloadRefused(f"HTTP {response.status_code}")
        response.raise_for_status()
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            start = 0  # The server knows no ranges: from the beginning.
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        require_space(partial.parent, (total - start if total else 0) + extra_bytes, what)
        done = start
        with translated_write_errors(partial.parent, what), partial.open("r+b" if start else "wb") as out:
            out.seek(start)
            progress(PullProgress(stage="download", done=done, total=total))
            # As it comes: what waits for a larger block would be lost with the connection.
            for block in response.iter_raw():
                out.write(block)
                done += len(block)
                progress(PullProgress(stage="download", done=done, total=total))
    return total is None or done == total


def _is_all_there(response: httpx.Response, partial: Path, start: int) -> bool:
    """After 416: whether the range asked for began exactly at the file's end. Else the part is of something else."""
    if response.headers.get("Content-Range", "").removeprefix("bytes */") == str(start):
        return True
    partial.unlink()
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
