"""A worker gets its stage of a model from the pool, and keeps it while it needs it, whatever is cleared meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from shard.model_fetch import ModelFetch, PieceFolders
from shard.open import open_checkpoint
from shard.piece_list import make_piece_list
from shard.piece_list_wire import encode_piece_list, list_digest
from shard.shared_model import is_skeleton
from tests.shard.pieces.given import stored
from tests.shard.tiny import save_tiny
from tests.transport.pieces.pool import Pool
from transport.edges import Edges
from transport.pieces.piece_source import StoreSource
from transport.pool_messages import SharedModel


@pytest.fixture
def given(tmp_path: Path) -> Iterator[tuple[Path, SharedModel, ModelFetch]]:
    folder = save_tiny("llama", 0, tmp_path / "model")
    pieces = make_piece_list(folder, "tiny")
    data = encode_piece_list(pieces)
    with Pool(tmp_path) as pool:
        head = pool.host("head")
        head.store = stored(folder, head.store.root, pieces)
        head.store.put(data, list_digest(data))
        pool.serve(head)
        host = pool.host("host")
        shared = SharedModel(name="tiny", digest=list_digest(data), peers=(head.peer,), hints=())
        edges = Edges(host.context, tmp_path, keys=host.keys, address=None)
        folders = PieceFolders(pieces=host.store.root, shared=tmp_path / "shared")
        yield folder, shared, ModelFetch(host.context, edges, folders)
        edges.close()


def test_what_a_stage_uses_is_not_cleared_nor_is_the_list(given: tuple[Path, SharedModel, ModelFetch]) -> None:
    folder, shared, models = given
    models.skeleton(shared)
    with ExitStack() as leases, closing(models.open(shared)) as checkpoint:
        last = checkpoint.spec.num_layers
        report = models.stage(
            shared, checkpoint, 0, last, leases=leases, progress=lambda done, total: None, stop=lambda: False
        )
        assert report.is_complete
        models.store.clear()
        assert any(StoreSource(models.store).held(shared.digest)), "others can still ask what is here"
        with closing(open_checkpoint(folder)) as plain:
            for name, info in plain.tensors.items():
                both = [np.empty(info.shape, np.float32) for _ in range(2)]
                plain.read_into(name, both[0], "float32")
                checkpoint.read_into(name, both[1], "float32")
                np.testing.assert_array_equal(*both)
    models.store.clear()
    assert not models.store.has(shared.digest)


def test_a_list_that_is_cleared_while_it_is_looked_for_is_got_anew(
    given: tuple[Path, SharedModel, ModelFetch], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shared, models = given
    has = models.store.has
    # There when it is looked for, and gone when it is opened.
    monkeypatch.setattr(models.store, "has", lambda digest: digest == shared.digest or has(digest))
    monkeypatch.setattr(models.store, "put", lambda data, digest: None)
    assert is_skeleton(models.skeleton(shared))
