"""The hub's own client against a hub on this machine, in processes of their own: it reads its environment once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.shard.test_safetensors import tensors, write_folder
from tests.shard.tiny_gguf import write_gguf

COMMIT = "1234567890" * 4
SCRIPT = """
import sys
from pathlib import Path
from potluck.store import Store
from transport.errors import PotluckError
store = Store(Path(sys.argv[1]))
try:
    if sys.argv[2] == "rm":
        print(store.remove(sys.argv[3]).name)
    else:
        seen = []
        model = store.pull(sys.argv[3], seen.append)
        print(model.name, model.path, model.num_bytes, max(event.done for event in seen if event.stage == "download"))
except PotluckError as error:
    print(type(error).__name__, error)
"""


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # Clients end without a word.
            super().handle()

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        files = {file.name: file.read_bytes() for file in sorted(self.folder.iterdir())}
        if path.startswith("/api/models/org/name/revision/"):
            siblings = [{"rfilename": name} for name in files]
            self._answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), body, {})
        elif path.startswith("/api/models/org/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._answer(json.dumps(tree).encode(), body, {})
        elif path.startswith("/org/name/resolve/") and path.split("/")[-1] in files:
            data = files[path.split("/")[-1]]
            etag = hashlib.sha256(data).hexdigest()
            self._answer(data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that uses this hub."""
    folder = write_folder(tmp_path / "repository", tensors())
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    write_gguf(folder / "tiny.gguf")
    handler = type("Handler", (_Hub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    thread.join()
    server.server_close()


def act(environment: dict[str, str], root: Path, verb: str, name: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(root), verb, name]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_repository_is_pulled_used_offline_and_removed(hub: dict[str, str], tmp_path: Path) -> None:
    name, path, _, counted = act(hub, tmp_path / "home", "pull", "hf:org/name").split()
    assert name == "org/name"
    present = sorted(file.name for file in Path(path).iterdir())
    assert present == ["config.json", "model.safetensors"], "pickles and other forms are left where they are"
    assert int(counted) == sum(file.stat().st_size for file in Path(path).iterdir())
    offline = hub | {"HF_HUB_OFFLINE": "1"}
    assert act(offline, tmp_path / "another", "pull", "hf:org/name").startswith(f"org/name {path}")
    assert act(hub, tmp_path / "home", "rm", "org/name") == "org/name"
    assert not Path(path).exists()


def test_one_gguf_of_a_repository_is_pulled(hub: dict[str, str], tmp_path: Path) -> None:
    name, path, *_ = act(hub, tmp_path / "home", "pull", "hf:org/name/tiny.gguf").split()
    assert name == "org/tiny"
    assert (Path(path) / "tokenizer.json").is_file()
    assert act(hub, tmp_path / "home", "rm", "org/tiny") == "org/tiny"
    assert not [file for file in (tmp_path / "hf").rglob("*.gguf") if file.exists()]


def test_what_the_hub_does_not_have_or_cant_say_is_told(hub: dict[str, str], tmp_path: Path) -> None:
    assert act(hub, tmp_path / "home", "pull", "hf:org/other").startswith("ModelNotFound the hub has no org/other")
    assert act(hub, tmp_path / "home", "pull", "hf:org/name/no.gguf").startswith("ModelNotFound org/name has no file")
    offline = hub | {"HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE is set" in act(offline, tmp_path / "home", "pull", "hf:org/name")
    unreachable = hub | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    answer = act(unreachable, tmp_path / "home", "pull", "hf:org/name")
    assert answer.startswith("DownloadFailed")
    assert "check the network and HF_ENDPOINT" in answer
