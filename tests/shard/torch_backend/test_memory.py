"""KV in reserved address space: grows in place, takes what it holds, gives back; and where there is none, copies."""

from __future__ import annotations

import gc
import mmap
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from shard.torch_backend import memory
from shard.torch_backend.kv import KVCache, LayerKV
from shard.torch_backend.memory import AddressSpace, can_reserve
from tests.support.shard.stage_runner import tiny_spec
from transport.messages.ring import SequenceId

HEADS, WIDTH = 2, 16
ROW_BYTES = WIDTH * 4
needs_reserving = pytest.mark.skipif(not can_reserve(), reason="this system has no address space to give away")


def rows_of(start: int, end: int) -> torch.Tensor:
    """[heads, positions, width]: another number for every position and head."""
    positions = torch.arange(float(start), float(end))[None, :, None]
    return positions.expand(HEADS, end - start, WIDTH) + torch.arange(HEADS)[:, None, None] / 4


def grow(layer: LayerKV, *ends: int, start: int = 0) -> set[int]:
    """Append up to each of `ends`, check all that is held, and return the addresses it was seen at."""
    addresses = set()
    for begin, end in pairwise((start, *ends)):
        keys, values, first = layer.append(begin, rows_of(begin, end), -rows_of(begin, end))
        assert first == 0
        assert torch.equal(keys, rows_of(0, end))
        assert torch.equal(values, -rows_of(0, end))
        addresses.add(keys.data_ptr())
    return addresses


def committed(positions: int) -> int:
    return 2 * HEADS * -(-positions * ROW_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


@needs_reserving
def test_growth_moves_nothing() -> None:
    layer, like = LayerKV(None, AddressSpace(5000, 3)), torch.empty(HEADS, 1, WIDTH)
    assert len(grow(layer, 1, 2, 70, 71, 900, 1000, 4000)) == 1
    assert layer.num_bytes() == committed(4000)
    keys, _, head_bytes, count = layer.kv_slot(4000, like)
    seen, _ = layer.append_one(4000, torch.zeros(2, HEADS, WIDTH))
    assert (keys, count) == (seen.data_ptr(), 4001)
    assert head_bytes == seen.stride(1) * 4
    assert torch.equal(seen[0, :, :4000], rows_of(0, 4000))


@needs_reserving
def test_layers_of_a_sequence_do_not_overlap() -> None:
    reservations = AddressSpace(100, 3)
    layers = [LayerKV(None, reservations) for _ in range(3)]
    for end in (40, 100):
        for index, layer in enumerate(layers):
            start = 0 if end == 40 else 40
            layer.append(start, rows_of(start, end) + 1000 * index, rows_of(start, end) - 1000 * index)
    for index, layer in enumerate(layers):
        keys, values, _ = layer.append(99, rows_of(99, 100), rows_of(99, 100))
        assert torch.equal(keys[:, :99], rows_of(0, 99) + 1000 * index)
        assert torch.equal(values[:, :99], rows_of(0, 99) - 1000 * index)


@needs_reserving
def test_going_far_back_gives_memory_back_and_a_little_does_not() -> None:
    layer = LayerKV(None, AddressSpace(5000, 1))
    grow(layer, 4000)
    layer.truncate(3900)
    assert layer.num_bytes() == committed(4000)
    layer.truncate(1000)
    assert layer.num_bytes() == committed(1000)
    grow(layer, 1001, 3000, start=1000)
    assert layer.num_bytes() == committed(3000)


@needs_reserving
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_given_back_is_free_again() -> None:
    layer = LayerKV(None, AddressSpace(100_000, 1))
    grow(layer, 100_000)
    before, held = resident_bytes(), layer.num_bytes()
    layer.truncate(100)
    assert before - resident_bytes() >= 0.9 * held
    grow(layer, 5000, start=100)


@pytest.mark.parametrize("context", [100, 4000])
def test_past_what_is_reserved_it_is_copied(context: int) -> None:
    layer = LayerKV(None, AddressSpace(context, 1))
    grow(layer, 90, 500, 501, 5000, 9000)
    assert layer.num_bytes() <= 2 * HEADS * ROW_BYTES * (9000 * 1.25 + 64)


def test_where_nothing_can_be_reserved_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "can_reserve", lambda: False)
    layer = LayerKV(None, AddressSpace(5000, 1))
    assert len(grow(layer, 1, 70, 900, 4000)) > 1


@needs_reserving
def test_where_addresses_run_out_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any, **named: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", no_memory)
    grow(LayerKV(None, AddressSpace(5000, 1)), 1, 70, 900, 4000)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's modes of overcommit")
@pytest.mark.parametrize(("mode", "reserves"), [("0", True), ("1", True), ("2", False)])
def test_strict_overcommit_reserves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, reserves: bool
) -> None:
    if not can_reserve():
        pytest.skip("this system has no address space to give away")
    (tmp_path / "mode").write_text(f"{mode}\n")
    monkeypatch.setattr(memory, "_OVERCOMMIT", tmp_path / "mode")
    assert can_reserve.__wrapped__() is reserves


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@needs_reserving
def test_many_short_sequences_take_little_and_leave_nothing() -> None:
    """64 sequences of 20 tokens, 8,192 reserved for each in 8 layers: a page for each head's keys and values."""
    cache, before, maps = KVCache(tiny_spec(0, 4, context_tokens=8192)), resident_bytes(), num_maps()
    for number in range(64):
        held = cache.sequence(SequenceId(number))
        for index in range(4):
            held.layer(index, None).append(0, rows_of(0, 20), rows_of(0, 20))
        held.length = 20
    assert cache.num_bytes() == 64 * 4 * committed(20)
    assert num_maps() - maps <= 64 + 4
    taken = resident_bytes() - before
    assert 0.9 * cache.num_bytes() <= taken <= 1.5 * cache.num_bytes() + 2**20
    for number in range(64):
        cache.release(SequenceId(number))
    assert cache.num_bytes() == 0
    assert resident_bytes() - before <= 0.5 * taken


def resident_bytes() -> int:
    gc.collect()  # What other tests left must not go in between.
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def num_maps() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())
