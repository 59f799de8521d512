"""An index that serves one tiny model, and a store of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck.store import Store
from tests.shard.tiny_gguf import write_gguf
from tests.store.index_server import Index, make_wheel, serve

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
