"""KV slots against a plain list of all keys, and masks against their definition."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

from shard.mlx_backend.kv import BLOCK_TOKENS, ROLLBACK_TOKENS, MlxLayerKV, chunk_mask, decode_mask, first_visible


def _rows(start: int, count: int) -> mx.array:
    return mx.arange(start, start + count, dtype=mx.float32).reshape(1, 1, count, 1)


@settings(deadline=None, max_examples=60)
@given(window=st.sampled_from([None, 1, 4, 100]), chunks=st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_fetch_gives_what_the_first_new_position_sees(window: int | None, chunks: list[int]) -> None:
    slot, start = MlxLayerKV(window, context_tokens=4096), 0
    for count in chunks:
        keys, values = slot.update_and_fetch(_rows(start, count), -_rows(start, count))
        wanted = np.arange(first_visible(start, window), start + count)
        assert np.array_equal(np.array(keys).ravel(), wanted)
        assert np.array_equal(np.array(values).ravel(), -wanted)
        start += count
        assert slot.can_truncate(max(0, start - ROLLBACK_TOKENS))
    if window is not None:
        assert slot.nbytes <= 2 * 4 * (window + ROLLBACK_TOKENS + 2 * BLOCK_TOKENS)


def test_a_full_layer_is_seldom_copied_and_little_of_it_is_unused() -> None:
    """Every growth copies all: together they must stay a few times what is held in the end."""
    slot, copied, capacity = MlxLayerKV(None, context_tokens=9000), 0, 0
    for position in range(0, 9000, 10):
        slot.update_and_fetch(_rows(position, 10), _rows(position, 10))
        if slot.nbytes != capacity:
            copied, capacity = copied + position, slot.nbytes
        assert capacity <= 2 * 4 * max(position + 10 + BLOCK_TOKENS, 1.25 * (position + 10) + BLOCK_TOKENS)
    assert capacity == 2 * 4 * 9000
    assert copied <= 5 * 9000


@pytest.mark.parametrize("window", [None, 100])
def test_a_fork_has_memory_of_its_own(window: int | None) -> None:
    slot = MlxLayerKV(window, context_tokens=4096)
    for start in range(0, 1000, 200):
        slot.update_and_fetch(_rows(start, 200), -_rows(start, 200))
    mx.eval(slot.arrays)
    copy = slot.fork(950)
    mx.eval(copy.arrays)
    keys, values = copy.update_and_fetch(_rows(5000, 3), -_rows(5000, 3))
    slot.update_and_fetch(_rows(1000, 1), -_rows(1000, 1))
    first = first_visible(950, window)
    assert np.array_equal(np.array(keys).ravel(), [*range(first, 950), 5000, 5001, 5002])
    assert np.array_equal(np.array(values).ravel(), [-position for position in (*range(first, 950), 5000, 5001, 5002)])
    keys, _ = slot.update_and_fetch(_rows(1001, 1), -_rows(1001, 1))
    assert np.array_equal(np.array(keys).ravel(), np.arange(first_visible(1001, window), 1002))
    assert copy.can_truncate(953 - ROLLBACK_TOKENS)


def test_a_short_fork_does_not_keep_the_memory_of_a_long_source() -> None:
    rows = mx.zeros((1, 4, 4000, 64))
    slot = MlxLayerKV(None, context_tokens=8192)
    slot.update_and_fetch(rows, rows)
    mx.eval(slot.arrays)
    copy = slot.fork(20)
    mx.eval(copy.arrays)
    held, source_bytes = mx.get_active_memory(), slot.nbytes
    del slot
    assert mx.get_active_memory() <= held - source_bytes
    assert copy.nbytes <= 2 * 4 * 64 * 4 * BLOCK_TOKENS


@given(
    start=st.integers(0, 40),
    count=st.integers(1, 30),
    window=st.one_of(st.none(), st.integers(1, 50)),
    as_array=st.booleans(),
)
@settings(deadline=None)
def test_chunk_mask_is_causal_within_the_window(start: int, count: int, window: int | None, as_array: bool) -> None:
    first = first_visible(start, window)
    queries, keys = np.arange(start, start + count)[:, None], np.arange(first, start + count)[None]
    wanted = (keys <= queries) & (keys > queries - (window or 10_000))
    mask = chunk_mask(start, count, window, as_array=as_array)
    if mask is None:
        assert wanted.all()
    elif isinstance(mask, str):
        assert not as_array
        assert np.array_equal(wanted, np.tril(np.ones(wanted.shape, bool), k=wanted.shape[1] - count))
    else:
        assert np.array_equal(np.array(mask), wanted)


@given(starts=st.lists(st.integers(0, 40), min_size=2, max_size=4), window=st.one_of(st.none(), st.integers(1, 50)))
@settings(deadline=None)
def test_decode_mask_hides_the_padding(starts: list[int], window: int | None) -> None:
    visible = [min(start + 1, window or 10_000) for start in starts]
    mask = decode_mask(starts, window)
    if mask is None:
        assert len(set(visible)) == 1
    else:
        assert np.array(mask).sum(axis=(1, 2, 3)).tolist() == visible
