"""A hub on this machine: the API that the real client speaks, ranges, a CDN at another port, faults on demand."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

REPOSITORY = "org/name"
COMMIT = "1234567890" * 4
TOKEN = "hf_secret"
_LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Request:
    """What a client asked for. `served` bytes of the body went out."""

    host: str
    method: str
    path: str
    range: str | None
    has_token: bool
    served: int = 0


@dataclass
class FakeHub:
    """Serves the folders of `repositories` by name. Files that real hubs keep apart come from `cdn_url`.

    `cuts`: after how many bytes of a large file's body to drop the connection, for the next requests. `wrong`: names of
    files that come with one byte changed. `statuses`: what the next requests for large files are answered. Without `go`
    the last quarter of a large file does not come.
    """

    repositories: dict[str, Path]
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    url: str = ""
    cdn_url: str = ""
    has_ranges: bool = True
    tells_metadata: bool = True
    is_gated: bool = False
    is_private: bool = False
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    go: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.go.set()

    @property
    def file_bytes(self) -> int:
        return sum(request.served for request in self.requests if "/api/" not in request.path)

    def asked(self, suffix: str) -> list[Request]:
        return [one for one in self.requests if one.path.endswith(suffix) and one.method == "GET" and one.served]


@contextmanager
def serve_hub(folder: Path, **options: Any) -> Iterator[FakeHub]:
    hub = FakeHub(repositories={REPOSITORY: folder}, **options)

    class Handler(_Handler):
        served = hub

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def checksum_of(path: Path) -> str:
    """What the hub calls a file by: SHA-256, or git's id of a small one."""
    status = path.stat()
    return _checksum(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=100)
def _checksum(path: Path, modified_ns: int, size: int) -> str:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest() if path.name.endswith(_LARGE) else git_id(data)


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # Clients end without a word.
            super().handle()

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub = self.served
        path = unquote(urlsplit(self.path).path)
        self._request = Request(
            host=f"http://{self.headers['Host']}",
            method=self.command,
            path=path,
            range=self.headers.get("Range"),
            has_token=self.headers.get("Authorization") == f"Bearer {TOKEN}",
        )
        with hub.lock:
            hub.requests.append(self._request)
        if self._request.host == hub.cdn_url:
            self._content(hub.repositories[path.strip("/").rsplit("/", 1)[0]] / path.rsplit("/", 1)[1])
            return
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = api[1] if api else resolve[1] if resolve else ""
        if name not in hub.repositories or (hub.is_private and not self._request.has_token):
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
            return
        revision = (api[3] if api else resolve[2] if resolve else None) or "main"
        commit = hub.commits.get(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif api and api[2] == "tree":
            self._tree(hub.repositories[name])
        elif api:
            self._info(hub.repositories[name], name, commit)
        elif resolve:
            self._resolve(hub.repositories[name], name, commit, resolve[3])

    def _info(self, folder: Path, name: str, commit: str) -> None:
        siblings: list[dict[str, Any]] = [{"rfilename": file} for file in _names(folder)]
        if "blobs" in parse_qs(urlsplit(self.path).query) and self.served.tells_metadata:
            siblings = [{"rfilename": file, **_metadata(folder / file, "blobId")} for file in _names(folder)]
        self._answer(json.dumps({"id": name, "sha": commit, "siblings": siblings, "private": False}).encode())

    def _tree(self, folder: Path) -> None:
        tree = [{"type": "file", "path": file, **_metadata(folder / file, "oid")} for file in _names(folder)]
        self._answer(json.dumps(tree).encode())

    def _resolve(self, folder: Path, name: str, commit: str, file: str) -> None:
        hub, path = self.served, folder / file
        common = {"X-Repo-Commit": commit}
        if hub.is_gated:
            code = 403 if self._request.has_token else 401
            self._refuse(code, "GatedRepo", f"Access to model {name} is restricted.")
        elif file not in _names(folder):
            self._refuse(404, "EntryNotFound", "Entry not found", common)
        elif file.endswith(_LARGE):
            linked = {"X-Linked-Etag": f'"{checksum_of(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            location = {"Location": f"{hub.cdn_url}/{name}/{quote(file)}?X-Amz-Signature=abc"}
            self._answer(b"Found. Redirecting", 302, common | linked | location)
        else:
            self._content(path, {"ETag": f'"{checksum_of(path)}"'} | common)

    def _content(self, path: Path, headers: dict[str, str] | None = None) -> None:
        hub, size = self.served, path.stat().st_size
        is_large = path.name.endswith(_LARGE)
        if is_large and hub.statuses:
            self._refuse(hub.statuses.pop(0), "", "")
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self._request.range or "") if hub.has_ranges else None
        first, end = 0, size
        headers = dict(headers or {}) | ({"Accept-Ranges": "bytes"} if hub.has_ranges else {})
        if wanted:
            first, end = int(wanted[1]), min(end, int(wanted[2]) + 1 if wanted[2] else end)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - first))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            with hub.lock:
                cut = hub.cuts.pop(0) if is_large and hub.cuts else None
            self._send(path, first, end if cut is None else min(end, first + cut), is_cut=cut is not None)

    def _send(self, path: Path, first: int, end: int, *, is_cut: bool) -> None:
        with path.open("rb") as file:
            file.seek(first)
            for at in range(first, end, 1 << 16):
                if path.name.endswith(_LARGE) and at > 0.75 * path.stat().st_size:
                    self.served.go.wait(240.0)
                block = file.read(min(1 << 16, end - at))
                if path.name in self.served.wrong:
                    block = block[:-1] + bytes([block[-1] ^ 1])
                self.wfile.write(block)
                self._request.served += len(block)
        if is_cut:
            self.close_connection = True
            self.wfile.flush()
            self.connection.close()

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._answer(json.dumps({"error": message}).encode(), status, said | (headers or {}))

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _metadata(path: Path, id_key: str) -> dict[str, Any]:
    size = path.stat().st_size
    if not path.name.endswith(_LARGE):
        return {"size": size, id_key: checksum_of(path)}
    sha256 = checksum_of(path)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    lfs = {"size": size, "pointerSize": len(pointer), "sha256": sha256, "oid": sha256}
    return {"size": size, id_key: git_id(pointer), "lfs": lfs}
