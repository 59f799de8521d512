"""A worker gets its stage of a model from the pool, and keeps it while it needs it, whatever is cleared meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from shard.pieces.cut_files import make_piece_list
from shard.pieces.metadata import is_metadata_folder
from shard.pieces.model_fetch import ModelFetcher, PieceFolders
from shard.pieces.open import open_checkpoint
from shard.pieces.piece_list import encode_piece_list, list_digest
from tests.support.shard.model_pieces import stored
from tests.support.shard.tiny import save_tiny
from tests.support.transport.pieces_pool import Pool
from transport.links.secure_endpoints import SecureEndpoints
from transport.messages.pool import SharedModel
from transport.pieces.piece_source import StoreSource


@pytest.fixture
def given(tmp_path: Path) -> Iterator[tuple[Path, SharedModel, ModelFetcher]]:
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
        edges = SecureEndpoints(host.context, tmp_path, keys=host.keys, address=None)
        folders = PieceFolders(pieces=host.store.root, shared=tmp_path / "shared")
        yield folder, shared, ModelFetcher(host.context, edges, folders)
        edges.close()


def test_what_a_stage_uses_is_not_cleared_nor_is_the_list(given: tuple[Path, SharedModel, ModelFetcher]) -> None:
    folder, shared, models = given
    models.fetch_metadata(shared)
    with ExitStack() as leases, closing(models.open(shared)) as checkpoint:
        last = checkpoint.spec.num_layers
        report = models.fetch_stage(
            shared, checkpoint, 0, last, leases=leases, progress=lambda done, total: None, stop=lambda: False
        )
        assert report.is_complete
        models.store.clear()
        assert any(StoreSource(models.store).have_bitmap(shared.digest)), "others can still ask what is here"
        with closing(open_checkpoint(folder)) as plain:
            for name, info in plain.tensors.items():
                both = [np.empty(info.shape, np.float32) for _ in range(2)]
                plain.read_into(name, both[0], "float32")
                checkpoint.read_into(name, both[1], "float32")
                np.testing.assert_array_equal(*both)
    models.store.clear()
    assert not models.store.has(shared.digest)


def test_a_list_that_is_cleared_while_it_is_looked_for_is_got_anew(
    given: tuple[Path, SharedModel, ModelFetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shared, models = given
    has = models.store.has
    # There when it is looked for, and gone when it is opened.
    monkeypatch.setattr(models.store, "has", lambda digest: digest == shared.digest or has(digest))
    monkeypatch.setattr(models.store, "put", lambda data, digest: None)
    assert is_metadata_folder(models.fetch_metadata(shared))
