"""KV memory of the torch backend: per sequence and layer, preallocated, grown as needed, cut back on truncate.

A full-attention layer keeps every position. A sliding-window layer keeps the window and `SLACK` positions more, so that
a sequence can be taken back by that much (rejected drafts, steps in flight) without replaying it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from transport.messages import SequenceId

SLACK = 128
_BLOCK = 64


class LayerKV:
    """Keys and values [kv_heads, capacity, head_dim] of one sequence in one layer; row 0 is position `base`."""

    __slots__ = ("base", "keys", "values", "window")

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.base = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def append(self, start: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Store key, value [kv_heads, tokens, head_dim] at positions from `start`, forgetting what was held beyond.

        Returns the keys and values those tokens may attend to, [kv_heads, positions, head_dim], and the position of
        the first of them: views of the cache, valid until the next append.
        """
        end = start + key.shape[1]
        if self.window is None:
            self._reserve(start, end, key, value)
            first = 0
        else:
            first = max(0, start - self.window + 1)
            if key.shape[1] > SLACK:
                return self._append_long(start, first, key, value)
            if self.keys is None or end - self.base > self.keys.shape[1]:
                self._slide(start, key, value)
        keys, values = self._held()
        row = start - self.base
        keys[:, row : end - self.base] = key
        values[:, row : end - self.base] = value
        span = slice(first - self.base, end - self.base)
        return keys[:, span], values[:, span], first

    def seat(self, start: int, like: torch.Tensor) -> tuple[int, int, int, int]:
        """Room for one token at `start`, which the caller writes: the addresses of the first key and value that it may
        attend to, the bytes from one KV head to the next, and how many positions that are, its own included.

        like: [kv_heads, 1, head_dim] of the KV's dtype. Valid until the next call.
        """
        first = 0
        if self.window is None:
            self._reserve(start, start + 1, like, like)
        else:
            first = max(0, start - self.window + 1)
            if self.keys is None or start + 1 - self.base > self.keys.shape[1]:
                self._slide(start, like, like)
        keys, values = self._held()
        element = keys.element_size()
        skipped = (first - self.base) * keys.stride(1) * element
        return keys.data_ptr() + skipped, values.data_ptr() + skipped, keys.stride(0) * element, start + 1 - first

    def reaches_back_to(self, length: int) -> bool:
        """Whether position `length` can be computed again, with all that its window sees."""
        return self.window is None or self.base <= max(0, length - self.window + 1)

    def num_bytes(self) -> int:
        if self.keys is None or self.values is None:
            return 0
        return self.keys.nbytes + self.values.nbytes

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _reserve(self, start: int, end: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Room for positions below `end`. Growing by a quarter keeps both copying and unused memory small."""
        capacity = 0 if self.keys is None else self.keys.shape[1]
        if end <= capacity:
            return
        self._move(0, start, _blocks(max(end, capacity + capacity // 4)), key, value)

    def _slide(self, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make room in a sliding layer: keep window - 1 + SLACK positions before `start`, in a buffer with SLACK free.

        A buffer is sized for what the sequence holds; it stops growing at window + 2 · SLACK.
        """
        assert self.window is not None
        kept = max(self.base, start - (self.window - 1 + SLACK))
        self._move(kept, start, start - kept + SLACK, key, value)

    def _append_long(
        self, start: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """A chunk longer than SLACK: attend over a temporary, so that the cache itself stays at its small size."""
        assert self.window is not None
        if self.keys is None or self.values is None:
            keys, values = key, value
        else:
            span = slice(first - self.base, start - self.base)
            keys = torch.cat((self.keys[:, span], key), dim=1)
            values = torch.cat((self.values[:, span], value), dim=1)
        end = start + key.shape[1]
        kept = max(first, end - (self.window - 1 + SLACK))
        self.keys = _sized(key, end - kept + SLACK)
        self.values = _sized(value, end - kept + SLACK)
        self.keys[:, : end - kept] = keys[:, kept - first :]
        self.values[:, : end - kept] = values[:, kept - first :]
        self.base = kept
        return keys, values, first

    def _move(self, kept: int, start: int, capacity: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """New buffers of `capacity` rows from position `kept`, holding [kept, start); keys first, then values, so that
        at most one old buffer lives beside the new ones."""
        for name, like in (("keys", key), ("values", value)):
            old: torch.Tensor | None = getattr(self, name)
            new = _sized(like, capacity)
            if old is not None:
                new[:, : start - kept] = old[:, kept - self.base : start - self.base]
            setattr(self, name, new)
        self.base = kept


def _sized(like: torch.Tensor, capacity: int) -> torch.Tensor:
    return like.new_empty((like.shape[0], capacity, like.shape[2]))


def _blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK


@dataclass(slots=True)
class SequenceKV:
    """A sequence's layers (made on first use, when their windows are known) and how many positions they hold."""

    length: int = 0
    layers: dict[int, LayerKV] = field(default_factory=dict)

    def layer(self, index: int, window: int | None) -> LayerKV:
        found = self.layers.get(index)
        if found is None:
            found = self.layers[index] = LayerKV(window)
        return found


class KVCache:
    """All sequences of a stage."""

    def __init__(self) -> None:
        self._sequences: dict[SequenceId, SequenceKV] = {}

    def sequence(self, sequence: SequenceId) -> SequenceKV:
        """The sequence's KV, empty if it was not held."""
        return self._sequences.setdefault(sequence, SequenceKV())

    def length(self, sequence: SequenceId) -> int:
        held = self._sequences.get(sequence)
        return 0 if held is None else held.length

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget positions ≥ `length`; the length reached: 0, with all memory freed, past what a window allows."""
        held = self._sequences.get(sequence)
        if held is None:
            return 0
        if length <= 0 or not all(layer.reaches_back_to(length) for layer in held.layers.values()):
            self.release(sequence)
            return 0
        held.length = min(held.length, length)
        return held.length

    def release(self, sequence: SequenceId) -> None:
        self._sequences.pop(sequence, None)

    def num_bytes(self) -> int:
        return sum(layer.num_bytes() for held in self._sequences.values() for layer in held.layers.values())

    def num_tokens(self) -> int:
        return sum(held.length for held in self._sequences.values())

    def num_sequences(self) -> int:
        return len(self._sequences)
