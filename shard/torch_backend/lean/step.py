"""What all layers of a step share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from shard.torch_backend.attention import RaggedStep, Run
from shard.torch_backend.kv import SLACK
from shard.torch_backend.lean.config import Rope
from shard.torch_backend.lean.rotary import StepAngles

PIECE_TOKENS = SLACK
"""More at once do not fit into what a sliding window keeps free."""
_PIECE_RUNS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows [first, first + num_rows) of a step, none of a decode entry, for kernels that take so many at a time: parts
    of runs, whose offsets count from the step's first row as ever."""

    first: int
    num_rows: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanStep:
    """A step's runs, decode entries first (rows [0, num_decode)), the `positions` int64 [tokens] of its rows, the
    model's rotary embeddings by name, and the dtype of the residual stream."""

    ragged: RaggedStep
    num_decode: int
    positions: torch.Tensor
    ropes: Mapping[str, Rope]
    dtype: torch.dtype
    _angles: dict[str, StepAngles] = field(default_factory=dict)
    _places: dict[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    _pieces: list[Piece] = field(default_factory=list)

    @property
    def pieces(self) -> Sequence[Piece]:
        """The rows after the decode rows."""
        if not self._pieces:
            self._pieces.extend(pieces_of(self.ragged.runs[self.num_decode :]))
        return self._pieces

    def angles(self, rope: str) -> StepAngles:
        """At the rows' positions."""
        found = self._angles.get(rope)
        if found is None:
            found = self._angles[rope] = StepAngles(self.ropes[rope], self.positions, self.dtype)
        return found

    def places_of_angles(self, rope: str | None) -> Sequence[tuple[int, int]]:
        """For each decode row the addresses of its cosines and sines; zeros without a rotary embedding."""
        if rope is None:
            return [(0, 0)] * self.num_decode
        found = self._places.get(rope)
        if found is None:
            found = self._places[rope] = self.angles(rope).addresses(self.num_decode)
        return found

    def place_of_angles(self, rope: str | None, row: int) -> tuple[int, int]:
        """The addresses of a row's cosines and sines, after which those of the next rows lie."""
        return (0, 0) if rope is None else self.angles(rope).address(row)


def pieces_of(runs: Sequence[Run]) -> list[Piece]:
    """Runs whose rows follow each other, cut where a piece is full."""
    pieces: list[Piece] = []
    parts: list[Run] = []
    room = PIECE_TOKENS

    def close() -> None:
        nonlocal parts, room
        if parts:
            num_rows = sum(part.num_tokens for part in parts)
            pieces.append(Piece(first=parts[0].offset, num_rows=num_rows, runs=tuple(parts)))
        parts, room = [], PIECE_TOKENS

    for run in runs:
        done = 0
        while done < run.num_tokens:
            count = min(room, run.num_tokens - done)
            parts.append(replace(run, offset=run.offset + done, start=run.start + done, num_tokens=count))
            done += count
            room -= count
            if room == 0 or len(parts) == _PIECE_RUNS:
                close()
    close()
    return pieces
