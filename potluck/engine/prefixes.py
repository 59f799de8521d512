"""Which sequences' KV begins like a new prompt: those that run, and those that are over and kept while there is room.

The engine's directory is the only one: stages keep what they are not told to release.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from potluck.engine.sequences import Reuse
from potluck.engine.sequences import Sequence as TokenSequence
from transport.messages import SequenceId

LEAST_TOKENS = 16
"""Shorter beginnings are computed again: that is as fast as to ask for them."""

ROLLBACK_TOKENS = 64
"""How far every backend can go back where layers forget what is out of their window."""

_MOST_KEPT = 256
_TAKEN_OVER = 0.75
"""A new prompt that has so much of a kept sequence takes it over; else it gets a copy, and both stay."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Known:
    """`ids` that are known of a sequence, and how many positions of KV it holds, or will before anything that is sent
    from now on: fewer, or, of one that runs and is known by its prompt, more."""

    ids: Ids
    held: Callable[[], int]


class PrefixDirectory:
    """Kept sequences in the order of their last use, and running ones. `has_window`: some layers forget positions, so
    that KV can be used only near its end."""

    def __init__(self, *, has_window: bool) -> None:
        self._has_window = has_window
        self._kept: OrderedDict[SequenceId, int] = OrderedDict()
        self._known: dict[SequenceId, _Known] = {}
        self._by_start: defaultdict[bytes, set[SequenceId]] = defaultdict(set)
        self.kept_tokens = 0
        self.num_changes = 0
        """How often a sequence came or went: a search that found nothing better need not be repeated before."""

    def __contains__(self, sequence: SequenceId) -> bool:
        return sequence in self._kept

    def running(self, sequence: TokenSequence) -> None:
        """A sequence is known to the stages from now on; others may copy from its prompt."""
        if len(sequence.prompt_ids) >= LEAST_TOKENS:
            prompt = np.array(sequence.prompt_ids, dtype=np.int64)
            self._learn(sequence.id, _Known(prompt, lambda: sequence.num_sent))

    def keep(self, sequence: SequenceId, ids: Sequence[int]) -> list[SequenceId]:
        """A sequence is over, its KV of `ids` stays. The ones that must go for it, oldest first."""
        self.forget(sequence)
        array = np.array(ids, dtype=np.int64)
        self._learn(sequence, _Known(array, lambda: array.size))
        self._kept[sequence] = array.size
        self.kept_tokens += array.size
        return [self.evict() for _ in range(len(self._kept) - _MOST_KEPT)]

    def evict(self) -> SequenceId:
        """Give up the one that was not used for longest. There must be one."""
        oldest = next(iter(self._kept))
        self.forget(oldest)
        return oldest

    def forget(self, sequence: SequenceId) -> None:
        """It is gone from the stages, or will be."""
        self.num_changes += 1
        self.kept_tokens -= self._kept.pop(sequence, 0)
        known = self._known.pop(sequence, None)
        if known is not None:
            start = _start(known.ids)
            self._by_start[start].discard(sequence)
            if not self._by_start[start]:
                del self._by_start[start]

    def kept_length(self, sequence: SequenceId) -> int:
        return self._kept[sequence]

    def find(self, ids: Sequence[int]) -> Reuse | None:
        """The longest beginning of `ids` that some sequence holds, all but their last token at most: that one must be
        computed to know what follows. None if it is not worth it."""
        if len(ids) <= LEAST_TOKENS:
            return None
        wanted = np.array(ids, dtype=np.int64)
        best: tuple[int, bool, SequenceId] | None = None
        for sequence in self._by_start.get(_start(wanted), ()):
            length = self._usable(sequence, wanted)
            candidate = (length, sequence in self._kept, sequence)
            if length >= LEAST_TOKENS and (best is None or candidate > best):
                best = candidate
        if best is None:
            return None
        length, is_kept, source = best
        if is_kept:
            self._kept.move_to_end(source)
        return Reuse(source, length, is_kept and length >= _TAKEN_OVER * self._kept[source])

    def clear(self) -> list[SequenceId]:
        """Give up all that is kept."""
        return [self.evict() for _ in range(len(self._kept))]

    def _learn(self, sequence: SequenceId, known: _Known) -> None:
        self.num_changes += 1
        if known.ids.size >= LEAST_TOKENS:
            self._known[sequence] = known
            self._by_start[_start(known.ids)].add(sequence)

    def _usable(self, sequence: SequenceId, wanted: Ids) -> int:
        known = self._known[sequence]
        held = known.held()
        most = min(held, known.ids.size, wanted.size - 1)
        differs = np.flatnonzero(known.ids[:most] != wanted[:most])
        length = int(differs[0]) if differs.size else most
        return 0 if self._has_window and held - length > ROLLBACK_TOKENS else length


def _start(ids: Ids) -> bytes:
    return ids[:LEAST_TOKENS].tobytes()
