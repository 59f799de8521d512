"""An index and a hub that serve one tiny model each, and a store of its own for each test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from potluck.store.hub_repository import Hub
from potluck.store.store import Store
from tests.support.shard.safetensors_folders import tensors, write_folder
from tests.support.shard.tiny_gguf import write_gguf
from tests.support.store.hub_checks import SEGMENT_BYTES
from tests.support.store.hub_server import TOKEN, FakeHub, serve_hub
from tests.support.store.index_server import Index, make_wheel, serve

# Not looked at by anything, but large enough for a download to be cut in the middle.
_PADDING_BYTES = 3 << 20


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes() + bytes(_PADDING_BYTES)
    return make_wheel(tmp_path, {"data/tiny.gguf": content})


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with serve(wheel) as index:
        index.use(monkeypatch)
        yield index


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may look up a name or leave this machine."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"a connection to {address}"
        connect(self, address)

    def refused(host: str, *arguments: Any, **options: Any) -> Any:
        assert host == "127.0.0.1", f"a look-up of {host}"
        return look_up(host, *arguments, **options)

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    large = {"model.layers.0.mlp.gate_proj.weight": torch.randn((50_000, 8), generator=draw)}
    return write_folder(tmp_path / "repository", tensors() | large)


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("potluck.store.hub_fetcher.SEGMENT_BYTES", SEGMENT_BYTES)
    monkeypatch.setattr("potluck.store.transfer.WAITS_S", (0.01, 0.01))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve_hub(repository) as hub:
        monkeypatch.setattr(Hub, "from_environment", lambda: Hub(endpoint=hub.url, cache=tmp_path / "cache"))
        yield hub
