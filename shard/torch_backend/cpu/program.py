"""A program is a list of kernel calls that is run as one, with the memory that they work in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from shard.torch_backend.cpu.compile import CompiledModule, KernelCall, KernelFields, new_fields

_ALIGNMENT = 64


def empty_aligned(num_bytes: int) -> np.ndarray:
    """uint8, at an address that vectors like."""
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes]


class Scratch(threading.local):
    """One buffer for each thread, grown to the largest call's need."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._address = 0

    def reserve(self, num_bytes: int) -> int:
        """The address of `num_bytes` that are the caller's until this thread's next call."""
        if num_bytes > self._buffer.size:
            self._buffer = empty_aligned(num_bytes)
            self._address = self._buffer.ctypes.data
        return self._address


_ENTRY_WORDS = 3

# table: for each call its function, its fields, and on how many threads each of a team runs it (1: alone).
_RUNNER = """
declare void @GOMP_parallel(ptr, ptr, i32, i32)

define void @run(ptr %program) {
entry:
  %table = load ptr, ptr %program
  %count.at = getelementptr i8, ptr %program, i64 8
  %count = load i64, ptr %count.at
  br label %test
test:
  %index = phi i64 [ 0, %entry ], [ %next, %done ]
  %more = icmp slt i64 %index, %count
  br i1 %more, label %body, label %end
body:
  %offset = mul i64 %index, 24
  %call.at = getelementptr i8, ptr %table, i64 %offset
  %function = load ptr, ptr %call.at
  %fields.at = getelementptr i8, ptr %call.at, i64 8
  %fields = load ptr, ptr %fields.at
  %threads.at = getelementptr i8, ptr %call.at, i64 16
  %threads = load i64, ptr %threads.at
  %several = icmp sgt i64 %threads, 1
  br i1 %several, label %team, label %alone
alone:
  call void %function(ptr %fields)
  br label %done
team:
  %size = trunc i64 %threads to i32
  call void @GOMP_parallel(ptr %function, ptr %fields, i32 %size, i32 0)
  br label %done
done:
  %next = add i64 %index, 1
  br label %test
end:
  ret void
}
"""


@cache
def _runner() -> KernelCall:
    return CompiledModule(_RUNNER).run("run")


class Program:
    """Calls in order. What their fields point to must live as long as the program: `keep` it.

    Calls run one after another, so that results of one kind, which are used up before the next of that kind is made,
    share one buffer: `rows`.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int, int], torch.Tensor] = {}
        self._scratch: dict[int, np.ndarray] = {}
        self._calls: list[tuple[int, int, int]] = []
        self._counts: list[tuple[KernelFields, int]] = []
        self._num_rows = 0
        self._kept: list[Any] = []  # Whatever it is, it is only held.
        self._table: KernelFields | None = None
        self._program, self._address = new_fields(2)

    def keep(self, *things: Any) -> None:
        self._kept.extend(things)

    def rows(self, kind: str, count: int, width: int) -> torch.Tensor:
        """The buffer for results of that kind, float32 [count, width]."""
        key = (kind, count, width)
        if key not in self._rows:
            self._rows[key] = torch.zeros((count, width), dtype=torch.float32)
        return self._rows[key]

    def scratch(self, num_bytes: int) -> int:
        """The address of memory that a call needs while it runs."""
        if num_bytes not in self._scratch:
            self._scratch[num_bytes] = empty_aligned(num_bytes)
        return int(self._scratch[num_bytes].ctypes.data)

    def counts_rows(self, fields: KernelFields, index: int) -> None:
        """That field of a call is its number of rows: fewer than its buffers have, where `set_rows` says so."""
        self._counts.append((fields, index))

    def set_rows(self, count: int) -> None:
        """For the runs from now on."""
        if count != self._num_rows:
            for fields, index in self._counts:
                fields[index] = count
            self._num_rows = count

    def call(self, function: int, fields: tuple[KernelFields, int], threads: int = 1) -> None:
        """Call the function at an address with these fields (and their address); by each of a team if `threads` > 1."""
        self._kept.append(fields[0])
        self._calls.append((function, fields[1], threads))
        self._table = None

    @property
    def calls(self) -> Sequence[tuple[int, int, int]]:
        """Addresses of functions and of their fields, and threads, in order."""
        return self._calls

    def run(self) -> None:
        if self._table is None:
            self._table, address = new_fields(_ENTRY_WORDS * len(self._calls))
            self._table[:] = [word for call in self._calls for word in call]
            self._program[:] = [address, len(self._calls)]
        _runner()(self._address)
