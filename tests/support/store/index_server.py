"""A package index on this machine: real HTTP with ranges, a real wheel, and faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PACKAGE, VERSION = "potluck-tiny-model", "1.0"


def make_wheel(folder: Path, models: dict[str, bytes], package: str = PACKAGE, requires: tuple[str, ...] = ()) -> Path:
    """A wheel with these files, not compressed, so that its length follows from theirs."""
    module = package.replace("-", "_")
    path = folder / f"{module}-{VERSION}-py3-none-any.whl"
    info = f"{module}-{VERSION}.dist-info"
    metadata = [
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}",
        *map("Requires-Dist: {}".format, requires),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in models.items():
            archive.writestr(f"{module}/{name}", content)
        archive.writestr(f"{info}/METADATA", "\n".join([*metadata, ""]))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@dataclass
class Index:
    """Serves one wheel and, by package, `parts`.

    `cuts`: after how many bytes of a body to drop the connection, for the next requests.
    `starts` are the offsets that clients asked for. Without `go` the last quarter of a wheel does not come.
    """

    wheel: Path
    parts: dict[str, Path] = field(default_factory=dict)
    url: str = ""
    has_ranges: bool = True
    announced_sha256: str | None = None
    cuts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.go.set()

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Make pip take this index and nothing else."""
        patch.setenv("PIP_CONFIG_FILE", "/dev/null")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
            patch.delenv(name, raising=False)
        patch.setenv("PIP_INDEX_URL", f"{self.url}/simple")


@contextmanager
def serve(wheel: Path) -> Iterator[Index]:
    index = Index(wheel=wheel)

    class Handler(_Handler):
        served = index

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Index
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # Clients are killed on purpose.
            super().handle()

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/").split("/")[-1]
        packages = {PACKAGE: self.served.wheel} | self.served.parts
        files = {wheel.name: wheel for wheel in packages.values()}
        if name in files:
            self._wheel(files[name])
        elif name.removesuffix(".metadata") in files:
            self._answer(_metadata(files[name.removesuffix(".metadata")]))
        elif name in packages:
            wheel = packages[name]
            digest = self.served.announced_sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
            link = f'<a href="/files/{wheel.name}#sha256={digest}" data-dist-info-metadata="true">{wheel.name}</a>'
            self._answer(link.encode(), "text/html")
        else:
            self.send_error(404)

    def _answer(self, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _wheel(self, wheel: Path) -> None:
        body = wheel.read_bytes()
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.served.has_ranges else 0
        self.served.starts.append(start)
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        until = start + self.served.cuts.pop(0) if self.served.cuts else len(body)
        for at in range(start, min(until, len(body)), 1 << 16):
            if at > 0.75 * len(body):
                self.served.go.wait(240.0)
            self.wfile.write(body[at : min(at + (1 << 16), until)])
        if until < len(body):
            self.close_connection = True
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


def _metadata(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA")))
