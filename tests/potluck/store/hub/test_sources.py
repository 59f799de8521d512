"""Where bytes come from before the hub is asked: this host, peers; and offline nobody else."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from potluck.store.store import Store
from tests.support.shard.safetensors_folders import CONFIG
from tests.support.store.hub_checks import SEGMENT_BYTES, SOURCE, WEIGHTS, assert_right, size_of
from tests.support.store.hub_server import FakeHub, checksum_of
from transport.errors import DownloadFailed


def test_revisions_share_what_is_the_same(hub: FakeHub, repository: Path, store: Store) -> None:
    first = store.pull(SOURCE)
    hub.commits |= {"v2": "2" * 40, "2" * 40: "2" * 40}
    (repository / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 32}))
    hub.requests.clear()
    second = store.pull(f"{SOURCE}@v2")
    assert (first.spec.context_tokens, second.spec.context_tokens) == (64, 32)
    assert second.path.name == "2" * 40
    assert hub.file_bytes == size_of(repository / "config.json")
    offline = Store(store.root.with_name("offline"), offline=True)
    assert offline.pull(f"{SOURCE}@v2").path == second.path
    assert offline.pull(SOURCE).path == first.path


class Peers:
    """Another host that has the files of `folder`; `spoils` changes a byte, `gives` bytes before it is gone."""

    def __init__(self, folder: Path, *, spoils: bool = False, gives: int | None = None) -> None:
        self.files = {checksum_of(path): path.read_bytes() for path in folder.iterdir()}
        self.spoils = spoils
        self.gives = gives
        self.given = 0

    def holds(self, sha256: str) -> bool:
        return sha256 in self.files

    def read(self, sha256: str, offset: int, out: memoryview) -> None:
        if self.gives is not None and self.given + len(out) > self.gives:
            raise DownloadFailed("the peer is gone")
        out[:] = self.files[sha256][offset : offset + len(out)]
        if self.spoils:
            out[0] ^= 1
        self.given += len(out)


def test_peers_are_asked_before_the_hub(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    peers = Peers(repository)
    model = Store(tmp_path / "home", peers=peers).pull(SOURCE)
    assert_right(model.path, repository)
    assert peers.given == size_of(repository / WEIGHTS)
    assert hub.file_bytes <= size_of(repository / "config.json") + (1 << 16)


def test_what_a_peer_began_the_hub_ends(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    peers = Peers(repository, gives=3 * SEGMENT_BYTES)
    assert_right(Store(tmp_path / "home", peers=peers).pull(SOURCE).path, repository)
    assert peers.given >= SEGMENT_BYTES
    assert hub.file_bytes <= size_of(*repository.iterdir()) - peers.given + (1 << 16)


def test_a_peer_that_gives_wrong_bytes_does_no_harm(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    assert_right(Store(tmp_path / "home", peers=Peers(repository, spoils=True)).pull(SOURCE).path, repository)


def test_a_file_that_another_model_has_is_not_fetched(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path
) -> None:
    first = store.pull(SOURCE)
    twin = shutil.copytree(repository, tmp_path / "twin")
    (twin / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 32}))
    hub.repositories["org/twin"] = twin
    hub.requests.clear()
    second = store.pull("hf:org/twin")
    assert_right(second.path, twin)
    assert hub.file_bytes <= size_of(twin / "config.json") + (1 << 16)
    assert (second.path / WEIGHTS).samefile(first.path / WEIGHTS)
    store.remove(first.name)
    assert_right(second.path, twin)


def test_a_copy_that_is_not_what_its_name_says_is_not_used(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path
) -> None:
    blobs = tmp_path / "cache" / "models--some--one" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / checksum_of(repository / WEIGHTS)).write_bytes(bytes(size_of(repository / WEIGHTS)))
    assert_right(store.pull(SOURCE).path, repository)


def test_offline_nothing_is_asked(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = Store(tmp_path / "offline", offline=True)
    path = store.pull(SOURCE).path
    asked = len(hub.requests)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"offline, and yet: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(subprocess, "run", refuse)  # pip
    assert offline.pull(SOURCE).path == path
    with pytest.raises(DownloadFailed, match=r"its tiny\.gguf is not in the hub's cache") as raised:
        offline.pull(f"{SOURCE}/tiny.gguf")
    assert "without --offline" in raised.value.hint
    with pytest.raises(DownloadFailed, match="not in the store"):
        offline.pull("pypi:some-model==1.0")
    (path / WEIGHTS).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadFailed, match="only a part of it"):
        Store(tmp_path / "third").pull(SOURCE)
    assert len(hub.requests) == asked
