"""Torch's memory: errors when it is out, translated, and address space reserved for KV on the CPU."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from transport.errors import DoesNotFit, StageFailed

# The CPU and Metal allocators raise a plain RuntimeError that only its text tells apart.
_OOM_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OOM_TEXTS)


@contextmanager
def translate_load_oom(what: str, device: str) -> Iterator[None]:
    """Out of memory while loading is DoesNotFit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"{device} has no memory left for {what}",
            hint="give this device fewer layers, lower --context, or add another device",
        ) from error


@contextmanager
def translate_step_oom(device: str, num_tokens: int, kv_bytes: Callable[[], int]) -> Iterator[None]:
    """Out of memory while running a step is StageFailed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        held_mib = kv_bytes() / 2**20
        raise StageFailed(
            f"{device} ran out of memory in a step of {num_tokens} tokens, with {held_mib:.0f} MiB of KV held",
            hint="lower --context or the number of parallel requests, or give this device fewer layers",
        ) from error


# Python's mmap names it only from 3.13 on. The values are those of x86-64 and arm64.
_NO_RESERVE = {"linux": 0x4000, "darwin": 0x40}
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservedRows:
    """Room for one layer's KV: rows [2, kv_heads, positions, head_dim], a view that keeps the memory alive. Each head's
    keys and values begin on a page of their own."""

    rows: torch.Tensor
    memory: mmap.mmap
    offset: int

    @property
    def row_bytes(self) -> int:
        return int(self.rows.stride(2)) * self.rows.element_size()

    def num_bytes(self, positions: int) -> int:
        """What the pages take that so many positions touch."""
        return int(self.rows.shape[0] * self.rows.shape[1]) * _pages(positions * self.row_bytes)

    def in_whole_pages(self, positions: int) -> int:
        """How many positions the pages hold that so many positions touch."""
        return min(_pages(positions * self.row_bytes) // self.row_bytes, self.rows.shape[2])

    def free_pages(self, first: int, end: int) -> None:
        """Free the whole pages of positions [first, end); what they hold is lost."""
        head_bytes = int(self.rows.stride(1)) * self.rows.element_size()
        begin, length = _pages(first * self.row_bytes), _pages(end * self.row_bytes) - _pages(first * self.row_bytes)
        # macOS keeps pages that are not needed; it takes those back that are free.
        advice = mmap.MADV_DONTNEED if sys.platform == "linux" else mmap.MADV_FREE
        for head in range(self.rows.shape[0] * self.rows.shape[1] if length > 0 else 0):
            self.memory.madvise(advice, self.offset + head * head_bytes + begin, length)


class AddressSpace:
    """One sequence's: a map for all its layers of one shape, since a process can have only so many (65,530 on Linux).

    It is unmapped when the last view of it is gone.
    """

    def __init__(self, context_tokens: int, num_layers: int) -> None:
        self._context_tokens = context_tokens
        self._num_layers = num_layers
        self._free: dict[tuple[int, int, torch.dtype], list[ReservedRows]] = {}

    def take(self, like: torch.Tensor) -> ReservedRows | None:
        """Room for the KV of a layer, like [kv_heads, tokens, head_dim]; None where it must be copied as it grows."""
        if like.device.type != "cpu" or not can_reserve():
            return None
        shape = (like.shape[0], like.shape[-1], like.dtype)
        if shape not in self._free:
            self._free[shape] = self._map(*shape)
        return self._free[shape].pop() if self._free[shape] else None

    def _map(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[ReservedRows]:
        row_bytes = head_dim * dtype.itemsize
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, row_bytes)  # so many positions end with a page
        # A step more: at distances of powers of two, all heads would fall on the same few places of the TLB.
        positions = (-(-self._context_tokens // step) + 1) * step
        layer_bytes = 2 * kv_heads * positions * row_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE[sys.platform]
        try:
            memory = mmap.mmap(-1, self._num_layers * layer_bytes, flags=flags)
        except (OSError, ValueError, OverflowError):  # no such stretch of addresses is free
            return []
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # One token would commit megabytes.
        rows = torch.frombuffer(memory, dtype=dtype).view(self._num_layers, 2, kv_heads, positions, head_dim)
        return [
            ReservedRows(rows=layer, memory=memory, offset=index * layer_bytes)
            for index, layer in enumerate(rows.unbind())
        ][::-1]


@cache
def can_reserve() -> bool:
    """Whether address space costs nothing here: not on Windows, under a limit on it, or where Linux counts it as used
    (strict overcommit)."""
    if sys.platform not in _NO_RESERVE:
        return False
    import resource  # not on Windows

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False
    return not _OVERCOMMIT.exists() or _OVERCOMMIT.read_text().strip() != "2"


def _pages(num_bytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
