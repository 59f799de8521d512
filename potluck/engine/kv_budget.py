"""KV memory as the engine accounts for it: claims of running sequences, and what is kept of those that are over.

Its ops tell the stages. They go out with the next step, in this order, so that memory is free before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from potluck.engine.prefixes import LEAST_TOKENS, PrefixDirectory
from potluck.engine.sequences import Sequence as TokenSequence
from transport.messages import Fork, Op, Open, Release, SequenceId


class KVBudget:
    """`keeps`: what is over stays, as long as nobody needs its memory, for prompts that begin alike."""

    def __init__(self, capacity_tokens: int, *, has_window: bool, keeps: bool) -> None:
        self._capacity = capacity_tokens
        self._keeps = keeps
        self._claimed = 0
        self._prefixes = PrefixDirectory(has_window=has_window)
        self._searched: dict[SequenceId, int] = {}
        self.ops: list[Op] = []

    @property
    def claimed_tokens(self) -> int:
        """Of running sequences."""
        return self._claimed

    @property
    def kept_tokens(self) -> int:
        return self._prefixes.kept_tokens

    @property
    def available_tokens(self) -> int:
        """What running sequences could still claim, if all that is kept went."""
        return self._capacity - self._claimed

    def claim(self, sequence: TokenSequence) -> bool:
        """Memory for all that the sequence knows and the next token; False if there is not enough.

        Kept sequences go for it, the least recently used ones first; but one whose KV it can continue is its own from
        now on.
        """
        found = None
        if self._may_reuse(sequence) and not sequence.is_opened and sequence.reuse is None:
            found = self._prefixes.find(sequence.ids(0, sequence.length))
        wanted = sequence.wanted_claim
        if found is not None and found.moves:
            wanted = max(wanted, self._prefixes.kept_length(found.source))
        more = wanted - sequence.claimed_tokens
        if more > self.available_tokens:
            return False
        if found is not None and found.moves:
            # From now on it is this sequence's, so that it is not evicted to make room for it.
            self._prefixes.forget(found.source)
            sequence.reuse = found
        self._claim(sequence, more)
        while self._claimed + self.kept_tokens > self._capacity:
            self.ops.append(Release(self._prefixes.evict()))
        return True

    def look_for_prefix(self, sequence: TokenSequence) -> None:
        """Before a sequence opens: whose KV it may copy, if it does not take one over already."""
        if not self._may_reuse(sequence) or (sequence.reuse is not None and sequence.reuse.moves):
            return
        if self._searched.get(sequence.id) == self._prefixes.num_changes:
            return
        found = self._prefixes.find(sequence.ids(0, sequence.length))
        if found is not None and found.moves:
            self._claim(sequence, max(0, self._prefixes.kept_length(found.source) - sequence.claimed_tokens))
            self._prefixes.forget(found.source)
        sequence.reuse = found
        self._searched[sequence.id] = self._prefixes.num_changes

    def sent(self) -> None:
        """All ops that waited are on their way."""
        self.ops.clear()

    def opened(self, sequence: TokenSequence) -> None:
        self._searched.pop(sequence.id, None)
        if self._keeps:
            self._prefixes.running(sequence)

    def leave(self, sequence: TokenSequence, *, is_good: bool) -> None:
        """A sequence that had claimed memory is over; what it computed may be kept, if it `is_good`."""
        self._searched.pop(sequence.id, None)
        self._claimed -= sequence.claimed_tokens
        sequence.claimed_tokens = 0
        if not sequence.is_opened:
            self._withdraw(sequence)
        elif self._keeps and is_good and sequence.num_sent >= LEAST_TOKENS:
            for evicted in self._prefixes.keep(sequence.id, sequence.ids(0, sequence.num_sent)):
                self.ops.append(Release(evicted))
        else:
            self._prefixes.forget(sequence.id)
            self.ops.append(Release(sequence.id))

    def _withdraw(self, sequence: TokenSequence) -> None:
        """A sequence that was never opened is over: what it would have taken over goes."""
        if sequence.reuse is not None and sequence.reuse.moves:
            self.ops.append(Release(sequence.reuse.source))
        sequence.reuse = None

    def failed(self, ops: Sequence[Op]) -> None:
        """A step failed, perhaps before its ops: forget again what they forgot, which does no harm."""
        for op in ops:
            match op:
                case Release():
                    self.ops.append(op)
                case Fork(source=source, moves=True):
                    self.ops.append(Release(source))
                case Open(sequence=sequence):
                    self.mistrust(sequence)
                case _:
                    pass

    def mistrust(self, sequence: SequenceId) -> None:
        """Some stage may hold less of it than was sent: if it is kept, it goes."""
        if sequence in self._prefixes:
            self._prefixes.forget(sequence)
            self.ops.append(Release(sequence))

    def clear(self) -> None:
        self.ops.extend(Release(sequence) for sequence in self._prefixes.clear())

    def lose_all(self) -> None:
        """The ring is gone, with all that it held."""
        self._prefixes.clear()
        self.ops.clear()

    def _may_reuse(self, sequence: TokenSequence) -> bool:
        """Not after a failure, which may have been that some stage did not hold what it was to copy."""
        return self._keeps and not sequence.num_retries

    def _claim(self, sequence: TokenSequence, more: int) -> None:
        self._claimed += more
        sequence.claimed_tokens += more
