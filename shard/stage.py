"""The contracts of a stage: what comes in, what goes out, and what a backend must do.

What is made anew for every step is a Struct: a frozen dataclass takes 15 µs to make when caches are cold.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from msgspec import Struct

from transport.messages.ring import Entry, EntryResult, Op, SequenceId
from transport.messages.ring import StageSpec as StageSpec


class Batch(Struct, frozen=True, kw_only=True):
    """A packed ragged batch: the entries' tokens one after another. Stage 0 gets `hidden` None and uses the token ids.

    hidden [num_tokens, hidden_size], float32, float16, or uint16 for bfloat16 bits.
    """

    entries: tuple[Entry, ...]
    hidden: np.ndarray | None


class KVStore(Protocol):
    """The KV caches of all sequences on a stage."""

    def length(self, sequence: SequenceId) -> int:
        """Positions of KV held; 0 for a sequence that is not held."""

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget positions ≥ `length` and return the length reached: `length`, or 0 where a sliding window no longer
        holds what going back so far needs (the engine then replays)."""

    def release(self, sequence: SequenceId) -> None: ...

    def fork(self, source: SequenceId, target: SequenceId, length: int) -> bool:
        """Give `target`, which holds nothing, a copy of the first `length` positions of `source`'s KV, 0 < length ≤
        length(source). Each may then go its own way. False, and nothing is copied, where a sliding window no longer
        holds what position `length` needs. Out of memory is StageFailed, and nothing is copied."""

    def move(self, source: SequenceId, target: SequenceId) -> None:
        """Give `target`, which holds nothing, all of `source`'s KV; `source` holds nothing any more. Copies nothing."""

    def num_bytes(self) -> int:
        """Of KV memory held now."""

    def num_tokens(self) -> int:
        """Positions held, over all sequences."""

    def num_sequences(self) -> int: ...


class ShardBackend(Protocol):
    """Layers [first, last) of one model on one device with its KV caches. Never touches a socket; not thread-safe.

    Each entry's `start` equals `kv.length(sequence)`: the caller has truncated, and refused what lies beyond.
    """

    spec: StageSpec
    weights_bytes: int

    @property
    def kv(self) -> KVStore: ...

    def forward(self, batch: Batch) -> np.ndarray:
        """Hidden states [num_tokens, hidden_size] in `next_dtype` or, on the last stage, float32 logits
        [Σ num_logits, vocab_size], rows in the order of the entries. Appends the batch to the sequences' KV. An empty
        batch (a step of ops only) gives no rows, of that width."""


class StageInput(Struct, frozen=True, kw_only=True):
    """One step as it reaches a stage: ops in order, then a batch."""

    ops: tuple[Op, ...]
    entries: tuple[Entry, ...]
    hidden: np.ndarray | None


class HiddenOutput(Struct, frozen=True, kw_only=True):
    """[num_tokens, hidden_size] in the shard's next_dtype (bfloat16 as uint16 bits)."""

    hidden: np.ndarray


class TokenOutput(Struct, frozen=True, kw_only=True):
    results: tuple[EntryResult, ...]


StageOutput = HiddenOutput | TokenOutput


class Stage(Protocol):
    """Runs layers [first, last) of one model. Owns KV memory; never touches a socket."""

    def forward(self, step: StageInput) -> StageOutput: ...

    def truncate(self, sequence: SequenceId, length: int) -> int: ...

    def release(self, sequence: SequenceId) -> None: ...
