"""What all layers of a step share: the order of its rows, their rotary angles, and slices of its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from shard.torch_backend.attention import RaggedStep, Run
from shard.torch_backend.fused.config import Rope
from shard.torch_backend.kv import ROLLBACK_TOKENS
from transport.messages.ring import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Entries in packed order, each one's first row, and the rows' token ids and positions, int64 [tokens].

    The first `num_decode` rows are of decode entries: those of one token. `logit_rows` are the packed rows whose logits
    are wanted. `source_rows[i]` is the row of the batch that is
    packed as row i; `rows_in_order` and `logits_in_order` take packed rows back to the batch's order. These three are
    None where that is the packed one already.
    """

    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]
    ids: np.ndarray
    positions: np.ndarray
    num_decode: int
    logit_rows: np.ndarray
    source_rows: np.ndarray | None
    rows_in_order: np.ndarray | None
    logits_in_order: np.ndarray | None


def pack_rows(entries: Sequence[Entry]) -> PackedRows:
    if all(len(entry.token_ids) == 1 and entry.num_logits == 1 for entry in entries):
        return _decode_only(tuple(entries))
    order = sorted(range(len(entries)), key=lambda index: len(entries[index].token_ids) != 1)
    packed = tuple(entries[index] for index in order)
    sizes = [len(entry.token_ids) for entry in packed]
    ends = np.cumsum(sizes)
    num_decode = sum(size == 1 for size in sizes)
    logit_rows = [np.arange(end - entry.num_logits, end) for entry, end in zip(packed, ends, strict=True)]
    moved = order != sorted(order)
    source = _source(order, [len(entry.token_ids) for entry in entries]) if moved else None
    logits = _source(order, [entry.num_logits for entry in entries]) if moved else None
    return PackedRows(
        entries=packed,
        offsets=tuple(int(end) - size for end, size in zip(ends, sizes, strict=True)),
        ids=np.array([token for entry in packed for token in entry.token_ids], dtype=np.int64),
        positions=np.concatenate([np.arange(entry.start, entry.start + len(entry.token_ids)) for entry in packed]),
        num_decode=num_decode,
        logit_rows=np.concatenate(logit_rows),
        source_rows=source,
        rows_in_order=None if source is None else np.argsort(source),
        logits_in_order=None if logits is None else np.argsort(logits),
    )


def _decode_only(entries: tuple[Entry, ...]) -> PackedRows:
    """The most frequent step by far: a token and its logits each."""
    count = len(entries)
    return PackedRows(
        entries=entries,
        offsets=tuple(range(count)),
        ids=np.array([entry.token_ids[0] for entry in entries], dtype=np.int64),
        positions=np.array([entry.start for entry in entries], dtype=np.int64),
        num_decode=count,
        logit_rows=np.arange(count),
        source_rows=None,
        rows_in_order=None,
        logits_in_order=None,
    )


def _source(order: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """Rows of the batch in packed order, for entries of `sizes` rows each."""
    firsts = np.cumsum([0, *sizes])
    return np.concatenate([np.arange(firsts[index], firsts[index + 1]) for index in order])


class StepAngles:
    """Cosines and sines at `positions` int64 [tokens], in the dtype that layers compute in.

    Made anew for each step: a few operations, where a table of all positions of a long context would take as much
    memory as a layer.
    """

    def __init__(self, rope: Rope, positions: torch.Tensor, dtype: torch.dtype) -> None:
        angles = positions.to(torch.float32)[:, None] * rope.inverse_frequencies.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if rope.scaling != 1.0:
            cos.mul_(rope.scaling)
            sin.mul_(rope.scaling)
        # [tokens, rotary_dim / 2]
        self._cos, self._sin = cos.to(dtype), sin.to(dtype)
        self._pairs: tuple[torch.Tensor, torch.Tensor] | None = None

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [tokens, 1, 2, rotary_dim / 2] each, as `ops.apply_rope_` takes them."""
        if self._pairs is None:
            cos, sin = self._cos, self._sin
            self._pairs = torch.stack((cos, cos), dim=1)[:, None], torch.stack((-sin, sin), dim=1)[:, None]
        return self._pairs

    def addresses(self, num_rows: int) -> Sequence[tuple[int, int]]:
        """Where the cosines and sines of each of the first rows lie, [rotary_dim / 2] float32 each; valid as long as
        this object lives."""
        row_bytes = self._cos.shape[1] * self._cos.element_size()
        cos, sin = self.address(0)
        return [(cos + row * row_bytes, sin + row * row_bytes) for row in range(num_rows)]

    def address(self, row: int) -> tuple[int, int]:
        """Of one row; those of the next rows follow."""
        at = row * self._cos.shape[1] * self._cos.element_size()
        return self._cos.data_ptr() + at, self._sin.data_ptr() + at


SLICE_TOKENS = ROLLBACK_TOKENS
"""More at once do not fit into what a sliding window keeps free."""
_SLICE_RUNS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSlice:
    """Rows [first, first + num_rows) of a step, none of a decode entry, for kernels that take so many at a time: parts
    of runs, whose offsets count from the step's first row as ever."""

    first: int
    num_rows: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedStep:
    """A step's runs, decode entries first (rows [0, num_decode)), the `positions` int64 [tokens] of its rows, the
    model's rotary embeddings by name, and the dtype of the residual stream."""

    ragged: RaggedStep
    num_decode: int
    positions: torch.Tensor
    ropes: Mapping[str, Rope]
    dtype: torch.dtype
    _angles: dict[str, StepAngles] = field(default_factory=dict)
    _angle_addresses: dict[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    _slices: list[PrefillSlice] = field(default_factory=list)

    @property
    def slices(self) -> Sequence[PrefillSlice]:
        """The rows after the decode rows."""
        if not self._slices:
            self._slices.extend(prefill_slices(self.ragged.runs[self.num_decode :]))
        return self._slices

    def angles(self, rope: str) -> StepAngles:
        """At the rows' positions."""
        found = self._angles.get(rope)
        if found is None:
            found = self._angles[rope] = StepAngles(self.ropes[rope], self.positions, self.dtype)
        return found

    def angle_addresses(self, rope: str | None) -> Sequence[tuple[int, int]]:
        """For each decode row the addresses of its cosines and sines; zeros without a rotary embedding."""
        if rope is None:
            return [(0, 0)] * self.num_decode
        found = self._angle_addresses.get(rope)
        if found is None:
            found = self._angle_addresses[rope] = self.angles(rope).addresses(self.num_decode)
        return found

    def angle_address(self, rope: str | None, row: int) -> tuple[int, int]:
        """The addresses of a row's cosines and sines, after which those of the next rows lie."""
        return (0, 0) if rope is None else self.angles(rope).address(row)


def prefill_slices(runs: Sequence[Run]) -> list[PrefillSlice]:
    """Runs whose rows follow each other, cut where a piece is full."""
    slices: list[PrefillSlice] = []
    parts: list[Run] = []
    room = SLICE_TOKENS

    def close() -> None:
        nonlocal parts, room
        if parts:
            num_rows = sum(part.num_tokens for part in parts)
            slices.append(PrefillSlice(first=parts[0].offset, num_rows=num_rows, runs=tuple(parts)))
        parts, room = [], SLICE_TOKENS

    for run in runs:
        done = 0
        while done < run.num_tokens:
            count = min(room, run.num_tokens - done)
            parts.append(replace(run, offset=run.offset + done, start=run.start + done, num_tokens=count))
            done += count
            room -= count
            if room == 0 or len(parts) == _SLICE_RUNS:
                close()
    close()
    return slices
