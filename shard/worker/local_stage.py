"""The rules of a step around a backend: ops, checks, the backend's forward, sampling."""

from __future__ import annotations

import numpy as np

from shard.stage import Batch, HiddenOutput, ShardBackend, StageInput, StageOutput, TokenOutput
from shard.worker.sampling import sample
from transport.errors import BadMessage, DoesNotFit, PotluckError, StageFailed
from transport.messages.ring import DType, Entry, EntryResult, Fork, Op, Open, Release, Sampling, SequenceId, Truncate

_WIRE_DTYPES: dict[DType, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}

_REPLAY_HINT = "the sequence must be replayed from its ids"


class _TokenHistory:
    """A sequence's ids by absolute position and how to sample it. Rewritten in place when positions are computed
    again, so that truncation and replay need nothing else."""

    def __init__(self, prompt_ids: tuple[int, ...], sampling: Sampling) -> None:
        self.num_prompt = len(prompt_ids)
        self.sampling = sampling
        self._ids = np.array(prompt_ids, dtype=np.int64)

    def write(self, start: int, token_ids: tuple[int, ...] | np.ndarray) -> None:
        end = start + len(token_ids)
        if end > self._ids.size:
            grown = np.empty(max(end, 2 * self._ids.size), dtype=np.int64)
            grown[: self._ids.size] = self._ids
            self._ids = grown
        self._ids[start:end] = token_ids

    def copy_prefix(self, source: _TokenHistory, length: int) -> bool:
        """Take over the ids that `source` has before `length`; False if the prompt has others."""
        known = min(self.num_prompt, length)
        if not np.array_equal(self.prefix(known), source.prefix(known)):
            return False
        self.write(known, source.prefix(length)[known:])
        return True

    def prefix(self, position: int) -> np.ndarray:
        return self._ids[:position]


class LocalStage:
    """Implements Stage over a backend. The last stage keeps each sequence's ids and samples.

    A step's ops are applied even where it then fails, here as on every other stage of the ring; its entries are all
    checked before any of them runs.
    """

    def __init__(self, backend: ShardBackend) -> None:
        self._backend = backend
        self._spec = backend.spec
        # None on the stages that don't sample: they only need to know which sequences are open.
        self._open: dict[SequenceId, _TokenHistory | None] = {}

    def forward(self, step: StageInput) -> StageOutput:
        """Raises BadMessage for a step that breaks a rule, StageFailed for one that this stage's state does not allow,
        DoesNotFit past its KV capacity; the open sequences stay open."""
        self._apply_ops(step.ops)
        self._check(step)
        for entry in step.entries:
            if entry.start < self._backend.kv.length(entry.sequence):
                self._truncate_exactly(entry.sequence, entry.start)
        output = self._backend.forward(Batch(entries=step.entries, hidden=step.hidden))
        if self._spec.is_last:
            return TokenOutput(results=self._sample(step.entries, output))
        return HiddenOutput(hidden=output)

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget KV of positions ≥ `length`; returns the length reached (see ShardBackend)."""
        return self._backend.kv.truncate(sequence, length)

    def release(self, sequence: SequenceId) -> None:
        """Forget the sequence; unknown ones are ignored."""
        self._open.pop(sequence, None)
        self._backend.kv.release(sequence)

    def _apply_ops(self, ops: tuple[Op, ...]) -> None:
        """Apply all ops in order, then raise what the first bad one deserves: a release is never skipped."""
        failure: PotluckError | None = None
        for op in ops:
            match op:
                case Open(sequence=sequence) if sequence in self._open:
                    failure = failure or BadMessage(f"sequence {sequence} is open already")
                case Open(sequence=sequence, prompt_ids=prompt_ids, sampling=sampling):
                    self._open[sequence] = _TokenHistory(prompt_ids, sampling) if self._spec.is_last else None
                case Truncate(sequence=sequence) if sequence not in self._open:
                    failure = failure or self._unknown_sequence_error(sequence)
                case Truncate(sequence=sequence, length=length):
                    self.truncate(sequence, length)
                case Fork():
                    try:
                        self._fork(op)
                    except PotluckError as error:
                        failure = failure or error
                case Release(sequence=sequence):
                    self.release(sequence)
        if failure is not None:
            raise failure

    def _fork(self, fork: Fork) -> None:
        """Raises BadMessage, StageFailed, DoesNotFit; nothing is copied then, and what moves is released all the same:
        its sender knows it no more."""
        try:
            self._check_fork(fork)
            if fork.moves:
                self._move(fork)
            elif not self._backend.kv.fork(fork.source, fork.sequence, fork.length):
                raise self._window_error(fork.source, fork.length)
        finally:
            if fork.moves and fork.source != fork.sequence:
                self.release(fork.source)

    def _move(self, fork: Fork) -> None:
        self._backend.kv.move(fork.source, fork.sequence)
        if self._backend.kv.length(fork.sequence) > fork.length:
            self._truncate_exactly(fork.sequence, fork.length)

    def _check_fork(self, fork: Fork) -> None:
        held = self._backend.kv.length(fork.source)
        if fork.sequence not in self._open:
            raise self._unknown_sequence_error(fork.sequence)
        if fork.length < 1 or fork.source == fork.sequence or self._backend.kv.length(fork.sequence):
            raise BadMessage(
                f"{fork.length} positions of sequence {fork.source} can't be given to sequence {fork.sequence}, which "
                f"holds {self._backend.kv.length(fork.sequence)}"
            )
        if fork.source not in self._open:
            raise self._unknown_sequence_error(fork.source)
        if held < fork.length:
            raise StageFailed(
                f"sequence {fork.source} holds {held} tokens of KV here, {fork.length} were to be given to sequence "
                f"{fork.sequence}",
                hint=_REPLAY_HINT,
            )
        num_tokens = self._backend.kv.num_tokens() + (0 if fork.moves else fork.length)
        if num_tokens > self._spec.kv_capacity_tokens:
            raise self._kv_capacity_error(num_tokens)
        source, target = self._open[fork.source], self._open[fork.sequence]
        if source is not None and target is not None and not target.copy_prefix(source, fork.length):
            raise BadMessage(
                f"sequences {fork.source} and {fork.sequence} have other ids in their first {fork.length} positions"
            )

    def _check(self, step: StageInput) -> None:
        seen: set[SequenceId] = set()
        num_tokens = self._backend.kv.num_tokens()
        for entry in step.entries:
            if entry.sequence in seen:
                raise BadMessage(f"sequence {entry.sequence} is in one step twice")
            seen.add(entry.sequence)
            self._check_entry(entry)
            num_tokens += entry.start + len(entry.token_ids) - self._backend.kv.length(entry.sequence)
        if step.entries and num_tokens > self._spec.kv_capacity_tokens:
            raise self._kv_capacity_error(num_tokens)
        self._check_hidden(step)

    def _check_entry(self, entry: Entry) -> None:
        if entry.sequence not in self._open:
            raise self._unknown_sequence_error(entry.sequence)
        num_tokens = len(entry.token_ids)
        if num_tokens == 0 or entry.start < 0 or not 0 <= entry.num_logits <= num_tokens:
            raise BadMessage(
                f"sequence {entry.sequence}: {num_tokens} tokens from position {entry.start} "
                f"with {entry.num_logits} logits is not an entry"
            )
        held = self._backend.kv.length(entry.sequence)
        if entry.start > held:
            raise StageFailed(
                f"sequence {entry.sequence} holds {held} tokens of KV here, the step starts at {entry.start}",
                hint=_REPLAY_HINT,
            )
        if entry.start + num_tokens > self._spec.context_tokens:
            raise BadMessage(
                f"sequence {entry.sequence} would reach {entry.start + num_tokens} tokens; the context is "
                f"{self._spec.context_tokens}",
                hint="shorten the prompt, or load the model with a larger --context",
            )

    def _check_hidden(self, step: StageInput) -> None:
        if self._spec.is_first:
            if step.hidden is not None:
                raise BadMessage("stage 0 works from token ids, but got hidden states")
            return
        if not step.entries:
            return
        num_tokens = sum(len(entry.token_ids) for entry in step.entries)
        wanted = np.dtype(_WIRE_DTYPES[self._spec.wire_dtype])
        if step.hidden is None or step.hidden.shape[0] != num_tokens or step.hidden.dtype != wanted:
            got = "none" if step.hidden is None else f"{step.hidden.shape[0]} of {step.hidden.dtype}"
            raise BadMessage(
                f"the step has {num_tokens} tokens and needs hidden states of {wanted} for them, got {got}"
            )

    def _truncate_exactly(self, sequence: SequenceId, length: int) -> None:
        if self._backend.kv.truncate(sequence, length) != length:
            raise self._window_error(sequence, length)

    def _sample(self, entries: tuple[Entry, ...], logits: np.ndarray) -> tuple[EntryResult, ...]:
        """Results of the entries that wanted logits; row i of `logits` [Σ num_logits, vocab] belongs to the i-th."""
        results = []
        row = 0
        for entry in entries:
            history = self._open[entry.sequence]
            assert history is not None, "the last stage keeps a history of every open sequence"
            history.write(entry.start, entry.token_ids)
            if entry.num_logits == 0:
                continue
            first = entry.start + len(entry.token_ids) - entry.num_logits + 1
            tokens = []
            for position in range(first, first + entry.num_logits):
                before = history.prefix(position)
                num_prompt = min(history.num_prompt, position)
                tokens.append(sample(logits[row], before, num_prompt, history.sampling, position))
                row += 1
            results.append(EntryResult(entry.sequence, first, tuple(tokens)))
        return tuple(results)

    def _window_error(self, sequence: SequenceId, position: int) -> StageFailed:
        return StageFailed(
            f"sequence {sequence} can't go back to position {position}: its sliding window has moved on",
            hint=_REPLAY_HINT,
        )

    def _kv_capacity_error(self, num_tokens: int) -> DoesNotFit:
        return DoesNotFit(
            f"this step would hold {num_tokens} tokens of KV; the stage has room for {self._spec.kv_capacity_tokens}",
            hint="wait for a request to end, or run fewer at once",
        )

    def _unknown_sequence_error(self, sequence: SequenceId) -> StageFailed:
        return StageFailed(
            f"sequence {sequence} is not open on the stage of layers [{self._spec.first}, {self._spec.last})",
            hint="the sequence must be opened and replayed from its ids",
        )
