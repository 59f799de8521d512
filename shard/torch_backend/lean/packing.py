"""The order of a step's rows: decode entries first, so that each kind of entry is one block for the projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transport.messages import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
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


def pack(entries: Sequence[Entry]) -> Packing:
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
    return Packing(
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


def _decode_only(entries: tuple[Entry, ...]) -> Packing:
    """The most frequent step by far: a token and its logits each."""
    count = len(entries)
    return Packing(
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
