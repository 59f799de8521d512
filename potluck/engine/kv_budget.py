"""The KV budget accounts for KV memory, and the prefix cache finds KV that begins like a new prompt."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from potluck.engine.request import PrefixReuse, TokenSequence
from transport.messages.ring import Fork, Op, Open, Release, SequenceId

MIN_PREFIX_TOKENS = 16
"""Shorter beginnings are computed again: that is as fast."""

ROLLBACK_TOKENS = 64
"""How far every backend can go back where layers forget what is out of their window."""

_MAX_CACHED = 256
_MOVE_FROM_FRACTION = 0.75
"""A new prompt that has so much of a kept sequence takes it over; else it gets a copy, and both stay."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _IndexedIds:
    """`ids` that are known of a sequence, and how many positions of KV it holds, or will before anything that is sent
    from now on: fewer, or, of one that runs and is known by its prompt, more."""

    ids: Ids
    held: Callable[[], int]


class PrefixCache:
    """Cached sequences in the order of their last use, and running ones. `has_window`: some layers forget positions, so
    that KV can be used only near its end."""

    def __init__(self, *, has_window: bool) -> None:
        self._has_window = has_window
        self._cached: OrderedDict[SequenceId, int] = OrderedDict()
        self._indexed: dict[SequenceId, _IndexedIds] = {}
        self._by_start: defaultdict[bytes, set[SequenceId]] = defaultdict(set)
        self.cached_tokens = 0
        self.num_changes = 0
        """How often a sequence came or went: a search that found nothing better need not be repeated before."""

    def __contains__(self, sequence: SequenceId) -> bool:
        return sequence in self._cached

    def add_running(self, sequence: TokenSequence) -> None:
        """A sequence is known to the stages from now on; others may copy from its prompt."""
        if len(sequence.prompt_ids) >= MIN_PREFIX_TOKENS:
            prompt = np.array(sequence.prompt_ids, dtype=np.int64)
            self._index(sequence.id, _IndexedIds(prompt, lambda: sequence.num_sent))

    def add_finished(self, sequence: SequenceId, ids: Sequence[int]) -> list[SequenceId]:
        """A sequence is over, its KV of `ids` stays. The ones that must go for it, oldest first."""
        self.remove(sequence)
        array = np.array(ids, dtype=np.int64)
        self._index(sequence, _IndexedIds(array, lambda: array.size))
        self._cached[sequence] = array.size
        self.cached_tokens += array.size
        return [self.evict() for _ in range(len(self._cached) - _MAX_CACHED)]

    def evict(self) -> SequenceId:
        """Give up the one that was not used for longest. There must be one."""
        oldest = next(iter(self._cached))
        self.remove(oldest)
        return oldest

    def remove(self, sequence: SequenceId) -> None:
        """It is gone from the stages, or will be."""
        self.num_changes += 1
        self.cached_tokens -= self._cached.pop(sequence, 0)
        known = self._indexed.pop(sequence, None)
        if known is not None:
            start = _start(known.ids)
            self._by_start[start].discard(sequence)
            if not self._by_start[start]:
                del self._by_start[start]

    def cached_length(self, sequence: SequenceId) -> int:
        return self._cached[sequence]

    def find(self, ids: Sequence[int]) -> PrefixReuse | None:
        """The longest beginning of `ids` that some sequence holds, all but their last token at most: that one must be
        computed to know what follows. None if it is not worth it."""
        if len(ids) <= MIN_PREFIX_TOKENS:
            return None
        wanted = np.array(ids, dtype=np.int64)
        best: tuple[int, bool, SequenceId] | None = None
        for sequence in self._by_start.get(_start(wanted), ()):
            length = self._usable_length(sequence, wanted)
            candidate = (length, sequence in self._cached, sequence)
            if length >= MIN_PREFIX_TOKENS and (best is None or candidate > best):
                best = candidate
        if best is None:
            return None
        length, is_kept, source = best
        if is_kept:
            self._cached.move_to_end(source)
        return PrefixReuse(source, length, is_kept and length >= _MOVE_FROM_FRACTION * self._cached[source])

    def clear(self) -> list[SequenceId]:
        """Give up all that is kept."""
        return [self.evict() for _ in range(len(self._cached))]

    def _index(self, sequence: SequenceId, known: _IndexedIds) -> None:
        self.num_changes += 1
        if known.ids.size >= MIN_PREFIX_TOKENS:
            self._indexed[sequence] = known
            self._by_start[_start(known.ids)].add(sequence)

    def _usable_length(self, sequence: SequenceId, wanted: Ids) -> int:
        known = self._indexed[sequence]
        held = known.held()
        most = min(held, known.ids.size, wanted.size - 1)
        differs = np.flatnonzero(known.ids[:most] != wanted[:most])
        length = int(differs[0]) if differs.size else most
        return 0 if self._has_window and held - length > ROLLBACK_TOKENS else length


def _start(ids: Ids) -> bytes:
    return ids[:MIN_PREFIX_TOKENS].tobytes()


class KVBudget:
    """`prefix_cache`: what is over stays, as long as nobody needs its memory, for prompts that begin alike."""

    def __init__(self, capacity_tokens: int, *, has_window: bool, prefix_cache: bool) -> None:
        self._capacity = capacity_tokens
        self._caches_prefixes = prefix_cache
        self._allocated = 0
        self._prefixes = PrefixCache(has_window=has_window)
        self._searched: dict[SequenceId, int] = {}
        self.ops: list[Op] = []

    @property
    def allocated_tokens(self) -> int:
        """Of running sequences."""
        return self._allocated

    @property
    def cached_tokens(self) -> int:
        return self._prefixes.cached_tokens

    @property
    def available_tokens(self) -> int:
        """What running sequences could still allocate, if all that is kept went."""
        return self._capacity - self._allocated

    def allocate(self, sequence: TokenSequence) -> bool:
        """Memory for all that the sequence knows and the next token; False if there is not enough.

        Kept sequences go for it, the least recently used ones first; but one whose KV it can continue is its own from
        now on.
        """
        found = None
        if self._can_reuse(sequence) and not sequence.is_opened and sequence.reuse is None:
            found = self._prefixes.find(sequence.ids(0, sequence.length))
        wanted = sequence.wanted_tokens
        if found is not None and found.moves:
            wanted = max(wanted, self._prefixes.cached_length(found.source))
        more = wanted - sequence.allocated_tokens
        if more > self.available_tokens:
            return False
        if found is not None and found.moves:
            # From now on it is this sequence's, so that it is not evicted to make room for it.
            self._prefixes.remove(found.source)
            sequence.reuse = found
        self._allocate(sequence, more)
        while self._allocated + self.cached_tokens > self._capacity:
            self.ops.append(Release(self._prefixes.evict()))
        return True

    def find_prefix(self, sequence: TokenSequence) -> None:
        """Before a sequence opens: whose KV it may copy, if it does not take one over already."""
        if not self._can_reuse(sequence) or (sequence.reuse is not None and sequence.reuse.moves):
            return
        if self._searched.get(sequence.id) == self._prefixes.num_changes:
            return
        found = self._prefixes.find(sequence.ids(0, sequence.length))
        if found is not None and found.moves:
            self._allocate(sequence, max(0, self._prefixes.cached_length(found.source) - sequence.allocated_tokens))
            self._prefixes.remove(found.source)
        sequence.reuse = found
        self._searched[sequence.id] = self._prefixes.num_changes

    def ops_sent(self) -> None:
        """All ops that waited are on their way."""
        self.ops.clear()

    def sequence_opened(self, sequence: TokenSequence) -> None:
        self._searched.pop(sequence.id, None)
        if self._caches_prefixes:
            self._prefixes.add_running(sequence)

    def free(self, sequence: TokenSequence, *, keep_prefix: bool) -> None:
        """A sequence that had allocated memory is over; what it computed is kept for others if `keep_prefix`."""
        self._searched.pop(sequence.id, None)
        self._allocated -= sequence.allocated_tokens
        sequence.allocated_tokens = 0
        if not sequence.is_opened:
            self._release_reuse(sequence)
        elif self._caches_prefixes and keep_prefix and sequence.num_sent >= MIN_PREFIX_TOKENS:
            for evicted in self._prefixes.add_finished(sequence.id, sequence.ids(0, sequence.num_sent)):
                self.ops.append(Release(evicted))
        else:
            self._prefixes.remove(sequence.id)
            self.ops.append(Release(sequence.id))

    def _release_reuse(self, sequence: TokenSequence) -> None:
        """A sequence that was never opened is over: what it would have taken over goes."""
        if sequence.reuse is not None and sequence.reuse.moves:
            self.ops.append(Release(sequence.reuse.source))
        sequence.reuse = None

    def step_failed(self, ops: Sequence[Op]) -> None:
        """A step failed, perhaps before its ops: forget again what they forgot, which does no harm."""
        for op in ops:
            match op:
                case Release():
                    self.ops.append(op)
                case Fork(source=source, moves=True):
                    self.ops.append(Release(source))
                case Open(sequence=sequence):
                    self.invalidate(sequence)
                case _:
                    pass

    def invalidate(self, sequence: SequenceId) -> None:
        """Some stage may hold less of it than was sent: if it is kept, it goes."""
        if sequence in self._prefixes:
            self._prefixes.remove(sequence)
            self.ops.append(Release(sequence))

    def clear(self) -> None:
        self.ops.extend(Release(sequence) for sequence in self._prefixes.clear())

    def reset(self) -> None:
        """The ring is gone, with all that it held."""
        self._prefixes.clear()
        self.ops.clear()

    def _can_reuse(self, sequence: TokenSequence) -> bool:
        """Not after a failure, which may have been that some stage did not hold what it was to copy."""
        return self._caches_prefixes and not sequence.num_retries

    def _allocate(self, sequence: TokenSequence, more: int) -> None:
        self._allocated += more
        sequence.allocated_tokens += more
