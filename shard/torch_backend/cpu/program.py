"""A list of kernel calls that is run as one: what a decode step does, layer after layer, without Python in between."""

from __future__ import annotations

from functools import cache
from typing import Any

from shard.torch_backend.cpu.compile import Compiled, Fields, Run, empty_fields

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
def _runner() -> Run:
    return Compiled(_RUNNER).run("run")


class Program:
    """Calls in order. What their fields point to must live as long as the program: `keep` it."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, int, int]] = []
        self._kept: list[Any] = []  # Whatever it is, it is only held.
        self._table: Fields | None = None
        self._program, self._address = empty_fields(2)

    def keep(self, *things: Any) -> None:
        self._kept.extend(things)

    def call(self, function: int, fields: tuple[Fields, int], threads: int = 1) -> None:
        """Call the function at an address with these fields (and their address); by each of a team if `threads` > 1."""
        self._kept.append(fields[0])
        self._calls.append((function, fields[1], threads))
        self._table = None

    def run(self) -> None:
        if self._table is None:
            self._table, address = empty_fields(_ENTRY_WORDS * len(self._calls))
            self._table[:] = [word for call in self._calls for word in call]
            self._program[:] = [address, len(self._calls)]
        _runner()(self._address)
