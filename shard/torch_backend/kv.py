"""KV memory of the torch backend: per sequence and layer, grown as needed, cut back on truncate.

A full-attention layer keeps every position: on the CPU in address space reserved for the whole context, so that growing
copies nothing, elsewhere in a buffer that is copied as it grows by quarters. A sliding-window layer keeps the window
and `ROLLBACK_TOKENS` positions more, so that a sequence can be taken back by that much (rejected drafts, steps in
flight) without
replaying it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from shard.stage import StageSpec
from shard.torch_backend.memory import AddressSpace, ReservedRows, translate_step_oom
from transport.messages.ring import SequenceId

ROLLBACK_TOKENS = 128
_BLOCK = 64
_MIN_FREED_POSITIONS = 256
"""Positions: freeing fewer, as when drafts are rejected, would cost more calls of the system than it frees pages."""


class LayerKV:
    """Keys and values of one sequence in one layer; row 0 is position `base`."""

    __slots__ = ("_capacity", "_held", "_keys", "_places", "_reservations", "_reserved", "_values", "base", "window")

    def __init__(self, window: int | None, reservations: AddressSpace | None = None) -> None:
        self.window = window
        self.base = 0
        self._reservations = reservations
        self._reserved: ReservedRows | None = None
        # [2, kv_heads, capacity, head_dim], and its two halves [1, …]: views that would cost a decode step to make.
        self._held: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        # How many positions there is memory for; the buffer's address, and the bytes from keys to values, from head to
        # head, from position to position: a decode step asks for them once a layer.
        self._capacity = 0
        self._places = (0, 0, 0, 0)

    def append(self, start: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Store key, value [kv_heads, tokens, head_dim] at positions from `start`, forgetting what was held beyond.

        Returns the keys and values those tokens may attend to, [kv_heads, positions, head_dim], and the position of
        the first of them: views of the cache, valid until the next append.
        """
        end = start + key.shape[1]
        first = self._first_visible(start)
        if self.window is not None and key.shape[1] > ROLLBACK_TOKENS:
            return self._append_long(start, first, key, value)
        held = self._reserve(start, end, key)
        row = start - self.base
        held[0, :, row : end - self.base] = key
        held[1, :, row : end - self.base] = value
        span = slice(first - self.base, end - self.base)
        return held[0, :, span], held[1, :, span], first

    def append_one(self, position: int, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `append`, for one token: its key and value, both [2, kv_heads, head_dim], → all that it sees, keys and
        values [1, kv_heads, positions, head_dim]."""
        held = self._held
        if held is None or position - self.base >= self._capacity:
            held = self._reserve(position, position + 1, both[0, :, None])
        row = position - self.base
        held.select(2, row).copy_(both)
        first = 0 if self.window is None else self._first_visible(position) - self.base
        assert self._keys is not None and self._values is not None
        return self._keys.narrow(2, first, row + 1 - first), self._values.narrow(2, first, row + 1 - first)

    def kv_slot(self, position: int, like: torch.Tensor) -> tuple[int, int, int, int]:
        """Room for one token, which the caller writes: the addresses of the first key and value that it sees, the bytes
        from one KV head to the next, and how many positions it sees, its own included. Valid until the next call.

        like: [kv_heads, 1, head_dim] of the KV's dtype.
        """
        if position - self.base >= self._capacity:
            self._reserve(position, position + 1, like)
        first = 0 if self.window is None else max(0, position - self.window + 1)
        address, half, head, row = self._places
        keys = address + (first - self.base) * row
        return keys, keys + half, head, position + 1 - first

    def slot_mapping(self, start: int, tokens: int, like: torch.Tensor) -> tuple[int, int, int, int]:
        """As `seat`, for a run of tokens from `start`, at most SLACK of them: the addresses of the first key and value
        that any of them sees, the bytes from one KV head to the next, and the position of that first one."""
        if start + tokens - self.base > self._capacity:
            self._reserve(start, start + tokens, like)
        first = self._first_visible(start)
        address, half, head, row = self._places
        keys = address + (first - self.base) * row
        return keys, keys + half, head, first

    def can_truncate(self, length: int) -> bool:
        """Whether position `length` can be computed again, with all that its window sees."""
        return self.window is None or self.base <= self._first_visible(length)

    def truncate(self, length: int) -> None:
        """Positions ≥ `length` are not needed any more: where they are many, give their memory back if that copies
        nothing."""
        if self._reserved is not None and self._capacity - length >= _MIN_FREED_POSITIONS:
            self._reserved.free_pages(length, self._capacity)
            self._capacity = self._reserved.in_whole_pages(length)

    def copy_to(self, target: LayerKV, length: int) -> None:
        """Give `target`, which is empty, what it needs to go on from position `length` and to go back by SLACK."""
        if self._held is None:
            return
        like = self._held[0]
        if self.window is None:
            kept, rows = 0, target._reserve(0, length, like)
        else:
            kept = max(self.base, length - (self.window - 1 + ROLLBACK_TOKENS))
            rows = target._move(kept, kept, length - kept + ROLLBACK_TOKENS, like)
        rows[:, :, : length - kept] = self._held[:, :, kept - self.base : length - self.base]

    def num_bytes(self) -> int:
        """Of reserved memory what is committed: whole pages, as far as was written."""
        if self._reserved is not None:
            return self._reserved.num_bytes(self._capacity)
        return 0 if self._held is None else self._held.nbytes

    def _first_visible(self, position: int) -> int:
        return 0 if self.window is None else max(0, position - self.window + 1)

    def _reserve(self, start: int, end: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer with rows for positions [start, end), what is held before them kept.

        A sliding layer keeps window - 1 + SLACK positions before `start`, with SLACK free: it stops growing at
        window + 2 · SLACK.
        """
        if self._held is not None and end - self.base <= self._capacity:
            return self._held
        if self.window is None:
            return self._reserve_full(start, end, like)
        kept = max(self.base, start - (self.window - 1 + ROLLBACK_TOKENS))
        return self._move(kept, start, start - kept + ROLLBACK_TOKENS, like)

    def _reserve_full(self, start: int, end: int, like: torch.Tensor) -> torch.Tensor:
        """More of the reserved memory. Where there is none, a quarter more than before: that keeps both copying and
        unused memory small."""
        if self._held is None and self._reservations is not None:
            self._reserved = self._reservations.take(like)
            if self._reserved is not None:
                self._hold(0, self._reserved.rows)
        if self._reserved is not None and self._held is not None and end <= self._reserved.rows.shape[2]:
            self._capacity = self._reserved.in_whole_pages(end)
            return self._held
        self._reserved = None
        return self._move(0, start, _blocks(max(end, self._capacity + self._capacity // 4)), like)

    def _append_long(
        self, start: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """A chunk longer than SLACK: attend over a temporary, so that the cache itself stays at its small size."""
        assert self.window is not None
        both = torch.stack((key, value))
        if self._held is not None:
            both = torch.cat((self._held[:, :, first - self.base : start - self.base], both), dim=2)
        end = start + key.shape[1]
        kept = max(first, end - (self.window - 1 + ROLLBACK_TOKENS))
        self._hold(kept, both.new_empty((2, key.shape[0], end - kept + ROLLBACK_TOKENS, key.shape[2])))
        assert self._held is not None
        self._held[:, :, : end - kept] = both[:, :, kept - first :]
        return both[0], both[1], first

    def _move(self, kept: int, start: int, capacity: int, like: torch.Tensor) -> torch.Tensor:
        """A new buffer of `capacity` rows from position `kept`, holding [kept, start)."""
        new = like.new_empty((2, like.shape[0], capacity, like.shape[-1]))
        if self._held is not None:
            new[:, :, : start - kept] = self._held[:, :, kept - self.base : start - self.base]
        return self._hold(kept, new)

    def _hold(self, base: int, held: torch.Tensor) -> torch.Tensor:
        self.base = base
        self._held, self._keys, self._values = held, held[:1], held[1:]
        self._capacity = held.shape[2]
        half, head, row = (stride * held.element_size() for stride in held.stride()[:3])
        self._places = (held.data_ptr(), half, head, row)
        return held


def _blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK


@dataclass(slots=True)
class SequenceKV:
    """A sequence's layers (made on first use, when their windows are known) and how many positions they hold."""

    length: int = 0
    layers: dict[int, LayerKV] = field(default_factory=dict)
    reservations: AddressSpace | None = None

    def layer(self, index: int, window: int | None) -> LayerKV:
        found = self.layers.get(index)
        if found is None:
            found = self.layers[index] = LayerKV(window, self.reservations)
        return found


class KVCache:
    """Implements KVStore."""

    def __init__(self, spec: StageSpec) -> None:
        self._spec = spec
        self._sequences: dict[SequenceId, SequenceKV] = {}

    def sequence(self, sequence: SequenceId) -> SequenceKV:
        """The sequence's KV, empty if it was not held."""
        found = self._sequences.get(sequence)
        if found is None:
            found = self._sequences[sequence] = self._empty()
        return found

    def length(self, sequence: SequenceId) -> int:
        held = self._sequences.get(sequence)
        return 0 if held is None else held.length

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """See KVStore. Past what a window allows, all memory is freed."""
        held = self._sequences.get(sequence)
        if held is None:
            return 0
        if length <= 0 or not all(layer.can_truncate(length) for layer in held.layers.values()):
            self.release(sequence)
            return 0
        held.length = min(held.length, length)
        for layer in held.layers.values():
            layer.truncate(held.length)
        return held.length

    @torch.inference_mode()
    def fork(self, source: SequenceId, target: SequenceId, length: int) -> bool:
        held, copied = self._sequences[source], self._empty()
        if not all(layer.can_truncate(length) for layer in held.layers.values()):
            return False
        with translate_step_oom(self._spec.device, length, self.num_bytes):
            for index, layer in held.layers.items():
                layer.copy_to(copied.layer(index, layer.window), length)
        copied.length = length
        self._sequences[target] = copied
        return True

    def move(self, source: SequenceId, target: SequenceId) -> None:
        self._sequences[target] = self._sequences.pop(source)

    def release(self, sequence: SequenceId) -> None:
        self._sequences.pop(sequence, None)

    def num_bytes(self) -> int:
        return sum(layer.num_bytes() for held in self._sequences.values() for layer in held.layers.values())

    def num_tokens(self) -> int:
        return sum(held.length for held in self._sequences.values())

    def num_sequences(self) -> int:
        return len(self._sequences)

    def _empty(self) -> SequenceKV:
        spec = self._spec
        return SequenceKV(reservations=AddressSpace(spec.context_tokens, spec.last - spec.first))
