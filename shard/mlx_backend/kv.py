"""KV memory of one sequence in one layer, and several of them as one decode batch.

Both look to a layer of mlx-lm like its own caches: `offset` for the rope, then `update_and_fetch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from transport.errors import StageFailed, UnsupportedModel
from transport.messages.ring import KVForm, SequenceId

BLOCK_TOKENS = 256
"""Buffers grow by at least this many tokens, so that a decode step writes in place instead of copying."""

ROLLBACK_TOKENS = 64
"""How far a sliding-window layer can always go back: more than any draft that speculation would take back."""


class MlxLayerKV:
    """Keys and values of one sequence in one layer, [1, kv_heads, tokens, head_dim], grown in blocks.

    A layer with a window keeps the last window + ROLLBACK_TOKENS positions, at most two blocks more between two moves,
    however long the chunks are. With a `group`, they are held in 8 bits with a scale and a bias for each group of so
    many numbers, and dequantized for each step: that saves memory, not time.
    """

    def __init__(self, window: int | None, context_tokens: int, group: int | None = None) -> None:
        self.offset = 0
        self._window = window
        self._context_tokens = context_tokens
        self._group = group
        self._base = 0  # the absolute position of the buffers' first token
        # Of keys and then of values: themselves, or their numbers, scales and biases.
        self.arrays: list[mx.array] = []

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [1, kv_heads, n, head_dim]; return all positions that the first of them may see, and themselves."""
        start, num_new = self.offset, keys.shape[2]
        new = self._encoded(keys) + self._encoded(values)
        if self._window is not None and num_new > BLOCK_TOKENS:
            return self._append_long(new)
        self._reserve(new)
        first = first_visible(start, self._window) - self._base
        begin, end = start - self._base, start - self._base + num_new
        for held, added in zip(self.arrays, new, strict=True):
            # Assignment to a slice replaces what the array object holds; MLX reuses its buffer, as nothing else refers
            # to it.
            held[..., begin:end, :] = added
        self.offset = start + num_new
        return self._decoded([held[..., first:end, :] for held in self.arrays])

    def can_truncate(self, length: int) -> bool:
        """Whether all that position `length` would look back at is still held."""
        return first_visible(length, self._window) >= self._base

    def truncate(self, length: int) -> None:
        assert length <= self.offset and self.can_truncate(length)
        self.offset = length

    def fork(self, length: int) -> MlxLayerKV:
        """A slot with a copy, not yet evaluated, of what position `length` looks back at and ROLLBACK_TOKENS more."""
        assert length <= self.offset and self.can_truncate(length)
        copy = MlxLayerKV(self._window, self._context_tokens, self._group)
        kept = self._kept(length)
        copy._base, copy.offset = length - kept, length
        # A slice alone would share the source's buffer: keep all of it alive, and make the next write to it a copy.
        # Joined to at least one row, it gets a buffer of its own.
        room = max(self._room(kept, 1), kept + 1)
        begin, end = length - kept - self._base, length - self._base
        copy.arrays = [_copied_buffer(held, held, begin, end, room) for held in self.arrays]
        return copy

    def _append_long(self, new: list[mx.array]) -> tuple[mx.array, mx.array]:
        """A chunk that is longer than a block, under a window: it attends over arrays of its own, and only their end is
        kept."""
        first = first_visible(self.offset, self._window)
        if self.arrays and first < self.offset:
            seen = slice(first - self._base, self.offset - self._base)
            new = [
                mx.concatenate([held[..., seen, :], added], axis=2)
                for held, added in zip(self.arrays, new, strict=True)
            ]
        count = new[0].shape[2]
        self.offset = first + count
        kept = min(count, self._kept(self.offset))
        self._base = self.offset - kept
        self.arrays = [_copied_buffer(added, added, count - kept, count, kept + BLOCK_TOKENS) for added in new]
        return self._decoded(new)

    def _encoded(self, x: mx.array) -> list[mx.array]:
        """[1, kv_heads, n, head_dim] as it is held: arrays [1, kv_heads, n, …]."""
        return [x] if self._group is None else list(mx.quantize(x, group_size=self._group, bits=8))

    def _decoded(self, arrays: list[mx.array]) -> tuple[mx.array, mx.array]:
        """Keys and values [1, kv_heads, n, head_dim]."""
        if self._group is None:
            return arrays[0], arrays[1]
        keys, key_scales, key_biases, values, value_scales, value_biases = arrays
        return (
            mx.dequantize(keys, key_scales, key_biases, group_size=self._group, bits=8),
            mx.dequantize(values, value_scales, value_biases, group_size=self._group, bits=8),
        )

    def _kept(self, length: int) -> int:
        """How many of the positions held before `length` to keep."""
        held = length - self._base
        return held if self._window is None else min(held, self._window + ROLLBACK_TOKENS)

    def _room(self, kept: int, num_new: int) -> int:
        """How long a buffer to make for what is kept and for new tokens.

        A full layer's grows by a quarter: all copying together then comes to four times what is held in the end. By
        more, less would be copied, but more than a fifth of the memory would lie unused, and while it is copied there
        are two of it.
        """
        growth = num_new if self._window is not None else max(num_new, kept // 4)
        rounded = -(-(kept + growth) // BLOCK_TOKENS) * BLOCK_TOKENS
        return max(kept + num_new, min(rounded, self._context_tokens))

    def _reserve(self, new: list[mx.array]) -> None:
        """Make room for `new`, dropping positions that are out of a window's reach."""
        num_new, held = new[0].shape[2], self.offset - self._base
        capacity = self.arrays[0].shape[2] if self.arrays else 0
        if held + num_new <= capacity:
            return
        kept = self._kept(self.offset)
        room = self._room(kept, num_new)
        old: list[mx.array | None] = [*self.arrays] or [None] * len(new)
        self.arrays = [_copied_buffer(one, like, held - kept, held, room) for one, like in zip(old, new, strict=True)]
        self._base += held - kept


class MlxKVStore:
    """Implements KVStore: a layer's KV for each layer of a sequence, made when it is first asked for. `windows` are the
    layers'."""

    def __init__(self, windows: Sequence[int | None], context_tokens: int, group: int | None) -> None:
        self._windows = windows
        self._context_tokens = context_tokens
        self._group = group
        self._sequences: dict[SequenceId, list[MlxLayerKV]] = {}

    def layers(self, sequence: SequenceId) -> list[MlxLayerKV]:
        slots = self._sequences.get(sequence)
        if slots is None:
            slots = [MlxLayerKV(window, self._context_tokens, self._group) for window in self._windows]
            self._sequences[sequence] = slots
        return slots

    def length(self, sequence: SequenceId) -> int:
        slots = self._sequences.get(sequence)
        return slots[0].offset if slots else 0

    def truncate(self, sequence: SequenceId, length: int) -> int:
        slots = self._sequences.get(sequence)
        if slots is None:
            return 0
        if length >= slots[0].offset:
            return slots[0].offset
        if length <= 0 or not all(slot.can_truncate(length) for slot in slots):
            self.release(sequence)
            return 0
        for slot in slots:
            slot.truncate(length)
        return length

    def release(self, sequence: SequenceId) -> None:
        self._sequences.pop(sequence, None)

    def fork(self, source: SequenceId, target: SequenceId, length: int) -> bool:
        slots = self._sequences[source]
        if not all(slot.can_truncate(length) for slot in slots):
            return False
        try:
            copies = [slot.fork(length) for slot in slots]
            mx.eval([slot.arrays for slot in copies])
        except (RuntimeError, MemoryError) as error:
            raise StageFailed(
                f"MLX could not copy {length} tokens of KV: {error}", hint="lower the context or the number of requests"
            ) from error
        self._sequences[target] = copies
        return True

    def move(self, source: SequenceId, target: SequenceId) -> None:
        self._sequences[target] = self._sequences.pop(source)

    def num_bytes(self) -> int:
        return sum(slot.nbytes for slots in self._sequences.values() for slot in slots)

    def num_tokens(self) -> int:
        return sum(slots[0].offset for slots in self._sequences.values())

    def num_sequences(self) -> int:
        return len(self._sequences)


class MlxDecodeKV:
    """The slots of several sequences in one layer as a cache for [batch, 1] tokens; `offset` is an array [batch].

    Attention needs one array of keys, so the sequences' keys are copied side by side, padded on the right to the
    longest. That costs a read and a write of the batch's KV; the weights, read once for all, are far larger.
    """

    def __init__(self, slots: Sequence[MlxLayerKV], offset: mx.array) -> None:
        self.offset = offset
        self._slots = slots

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        rows = [slot.update_and_fetch(keys[i : i + 1], values[i : i + 1]) for i, slot in enumerate(self._slots)]
        return _padded([k for k, _ in rows]), _padded([v for _, v in rows])


def kv_group_size(form: KVForm, head_dim: int | None) -> int | None:
    """How many numbers of a head share a scale where KV is held in that form; None for none. Raises UnsupportedModel
    for heads that 8 bits are not made for."""
    if form == "full":
        return None
    for group in (128, 64, 32):
        if head_dim is not None and head_dim % group == 0:
            return group
    heads = "heads of an unknown size" if head_dim is None else f"heads of {head_dim} dimensions"
    raise UnsupportedModel(
        f"MLX can't hold KV in 8 bits for {heads}: it takes multiples of 32", hint="leave --kv-cache 8-bit out"
    )


def first_visible(position: int, window: int | None) -> int:
    """The first position that `position` attends to: a window of w covers itself and the w - 1 before it."""
    return 0 if window is None else max(0, position - window + 1)


def chunk_mask(start: int, num_tokens: int, window: int | None, *, as_array: bool) -> mx.array | str | None:
    """The mask of `num_tokens` queries from position `start`, over the keys that `KVSlot` returns for them.

    None where all is visible, else "causal" (aligned at the end) or a bool array [num_tokens, keys].
    """
    if num_tokens == 1:
        return None
    first, end = first_visible(start, window), start + num_tokens
    slides = first_visible(end - 1, window) > first
    if not slides and not as_array:
        return "causal"
    queries = mx.arange(start, end)[:, None]
    keys = mx.arange(first, end)[None]
    mask = keys <= queries
    return mask & (keys > queries - window) if window is not None else mask


def decode_mask(starts: Sequence[int], window: int | None) -> mx.array | None:
    """Which of the padded keys are real, bool [batch, 1, 1, keys]; None where all are."""
    visible = [start + 1 - first_visible(start, window) for start in starts]
    if min(visible) == max(visible):
        return None
    return (mx.arange(max(visible))[None] < mx.array(visible)[:, None])[:, None, None, :]


def _copied_buffer(old: mx.array | None, new: mx.array, begin: int, end: int, room: int) -> mx.array:
    """A buffer of `room` tokens that starts with tokens [begin, end) of the old one."""
    _, num_heads, _, head_dim = new.shape
    empty = mx.zeros((1, num_heads, room - (end - begin), head_dim), new.dtype)
    return empty if old is None or end == begin else mx.concatenate([old[..., begin:end, :], empty], axis=2)


def _padded(rows: Sequence[mx.array]) -> mx.array:
    """[1, heads, n_i, head_dim] each → [batch, heads, max n_i, head_dim], zeros on the right."""
    longest = max(row.shape[2] for row in rows)
    if all(row.shape[2] == longest for row in rows):
        return mx.concatenate(list(rows), axis=0)
    out = mx.zeros((len(rows), rows[0].shape[1], longest, rows[0].shape[3]), rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, :, : row.shape[2], :] = row[0]
    return out
