"""Address space for KV on the CPU: reserved for a whole context, committed page by page as it is written, never moved.

Where the system has no such thing, or counts what is reserved as if it were used, there is none: KV is copied as it
grows.
"""

from __future__ import annotations

import math
import mmap
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# Python's mmap names it only from 3.13 on. The values are those of x86-64 and arm64.
_NO_RESERVE = {"linux": 0x4000, "darwin": 0x40}
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
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

    def give_back(self, first: int, end: int) -> None:
        """Free the whole pages of positions [first, end); what they hold is lost."""
        head_bytes = int(self.rows.stride(1)) * self.rows.element_size()
        begin, length = _pages(first * self.row_bytes), _pages(end * self.row_bytes) - _pages(first * self.row_bytes)
        # macOS keeps pages that are not needed; it takes those back that are free.
        advice = mmap.MADV_DONTNEED if sys.platform == "linux" else mmap.MADV_FREE
        for head in range(self.rows.shape[0] * self.rows.shape[1] if length > 0 else 0):
            self.memory.madvise(advice, self.offset + head * head_bytes + begin, length)


class Reservations:
    """One sequence's: a map for all its layers of one shape, since a process can have only so many (65,530 on Linux).

    It is unmapped when the last view of it is gone.
    """

    def __init__(self, context_tokens: int, num_layers: int) -> None:
        self._context_tokens = context_tokens
        self._num_layers = num_layers
        self._free: dict[tuple[int, int, torch.dtype], list[Reserved]] = {}

    def take(self, like: torch.Tensor) -> Reserved | None:
        """Room for the KV of a layer, like [kv_heads, tokens, head_dim]; None where it must be copied as it grows."""
        if like.device.type != "cpu" or not can_reserve():
            return None
        shape = (like.shape[0], like.shape[-1], like.dtype)
        if shape not in self._free:
            self._free[shape] = self._map(*shape)
        return self._free[shape].pop() if self._free[shape] else None

    def _map(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Reserved]:
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
            Reserved(rows=layer, memory=memory, offset=index * layer_bytes) for index, layer in enumerate(rows.unbind())
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
