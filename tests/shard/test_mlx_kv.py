"""KV slots against a plain list of all keys, and masks against their definition."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

from shard.mlx_backend.kv import BLOCK_TOKENS, ROLLBACK_TOKENS, KVSlot, chunk_mask, decode_mask, first_visible


def _rows(start: int, count: int) -> mx.array:
    return mx.arange(start, start + count, dtype=mx.float32).reshape(1, 1, count, 1)


@settings(deadline=None, max_examples=60)
@given(window=st.sampled_from([None, 1, 4, 100]), chunks=st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_fetch_gives_what_the_first_new_position_sees(window: int | None, chunks: list[int]) -> None:
    slot, start = KVSlot(window, context_tokens=4096), 0
    for count in chunks:
        keys, values = slot.update_and_fetch(_rows(start, count), -_rows(start, count))
        wanted = np.arange(first_visible(start, window), start + count)
        assert np.array_equal(np.array(keys).ravel(), wanted)
        assert np.array_equal(np.array(values).ravel(), -wanted)
        start += count
        assert slot.can_truncate(max(0, start - ROLLBACK_TOKENS))
    if window is not None:
        held = 2 * 4 * (window + ROLLBACK_TOKENS + max(chunks) + BLOCK_TOKENS)
        assert slot.nbytes <= held


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
