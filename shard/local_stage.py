"""LocalStage: the rules of a step around a backend. Ops, checks, the backend's forward, sampling."""

from __future__ import annotations

import numpy as np

from shard.sampling import sample
from shard.stage import Batch, HiddenOutput, ShardBackend, StageInput, StageOutput, TokenOutput
from transport.errors import BadMessage, DoesNotFit, PotluckError, StageFailed
from transport.messages import DType, Entry, Op, Open, Release, Result, Sampling, SequenceId, Truncate

_WIRE_DTYPES: dict[DType, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class _History:
    """A sequence's ids by absolute position and how to sample it. Rewritten in place when positions are computed
    again, so that truncation and replay need nothing else."""

    def __init__(self, prompt_ids: tuple[int, ...], sampling: Sampling) -> None:
        self.num_prompt = len(prompt_ids)
        self.sampling = sampling
        self._ids = np.array(prompt_ids, dtype=np.int64)

    def write(self, start: int, token_ids: tuple[int, ...]) -> None:
        end = start + len(token_ids)
        if end > self._ids.size:
            grown = np.empty(max(end, 2 * self._ids.size), dtype=np.int64)
            grown[: self._ids.size] = self._ids
            self._ids = grown
        self._ids[start:end] = token_ids

    def before(self, position: int) -> np.ndarray:
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
        self._open: dict[SequenceId, _History | None] = {}

    def forward(self, step: StageInput) -> StageOutput:
        """Raises BadMessage for a step that breaks a rule, StageFailed for one that this stage's state does not allow,
        DoesNotFit past its KV capacity; the open sequences stay open."""
        self._apply(step.ops)
        self._check(step)
        for entry in step.entries:
            if entry.start < self._backend.length(entry.sequence):
                self._go_back(entry)
        output = self._backend.forward(Batch(entries=step.entries, hidden=step.hidden))
        if self._spec.is_last:
            return TokenOutput(results=self._sample(step.entries, output))
        return HiddenOutput(hidden=output)

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget KV of positions ≥ `length`; returns the length reached (see ShardBackend)."""
        return self._backend.truncate(sequence, length)

    def release(self, sequence: SequenceId) -> None:
        """Forget the sequence; unknown ones are ignored."""
        self._open.pop(sequence, None)
        self._backend.release(sequence)

    def _apply(self, ops: tuple[Op, ...]) -> None:
        """Apply all ops in order, then raise what the first bad one deserves: a release is never skipped."""
        failure: PotluckError | None = None
        for op in ops:
            match op:
                case Open(sequence=sequence) if sequence in self._open:
                    failure = failure or BadMessage(f"sequence {sequence} is open already")
                case Open(sequence=sequence, prompt_ids=prompt_ids, sampling=sampling):
                    self._open[sequence] = _History(prompt_ids, sampling) if self._spec.is_last else None
                case Truncate(sequence=sequence) if sequence not in self._open:
                    failure = failure or self._unknown(sequence)
                case Truncate(sequence=sequence, length=length):
                    self.truncate(sequence, length)
                case Release(sequence=sequence):
                    self.release(sequence)
        if failure is not None:
            raise failure

    def _check(self, step: StageInput) -> None:
        seen: set[SequenceId] = set()
        num_tokens = self._backend.num_kv_tokens()
        for entry in step.entries:
            if entry.sequence in seen:
                raise BadMessage(f"sequence {entry.sequence} is in one step twice")
            seen.add(entry.sequence)
            self._check_entry(entry)
            num_tokens += entry.start + len(entry.token_ids) - self._backend.length(entry.sequence)
        if step.entries and num_tokens > self._spec.kv_capacity_tokens:
            raise DoesNotFit(
                f"this step would hold {num_tokens} tokens of KV; the stage has room for "
                f"{self._spec.kv_capacity_tokens}",
                hint="wait for a request to end, or run fewer at once",
            )
        self._check_hidden(step)

    def _check_entry(self, entry: Entry) -> None:
        if entry.sequence not in self._open:
            raise self._unknown(entry.sequence)
        num_tokens = len(entry.token_ids)
        if num_tokens == 0 or entry.start < 0 or not 0 <= entry.num_logits <= num_tokens:
            raise BadMessage(
                f"sequence {entry.sequence}: {num_tokens} tokens from position {entry.start} "
                f"with {entry.num_logits} logits is not an entry"
            )
        held = self._backend.length(entry.sequence)
        if entry.start > held:
            raise StageFailed(
                f"sequence {entry.sequence} holds {held} tokens of KV here, the step starts at {entry.start}",
                hint="the sequence must be replayed from its ids",
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

    def _go_back(self, entry: Entry) -> None:
        reached = self._backend.truncate(entry.sequence, entry.start)
        if reached != entry.start:
            raise StageFailed(
                f"sequence {entry.sequence} can't go back to position {entry.start}: its sliding window has moved on",
                hint="the sequence must be replayed from its ids",
            )

    def _sample(self, entries: tuple[Entry, ...], logits: np.ndarray) -> tuple[Result, ...]:
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
                before = history.before(position)
                num_prompt = min(history.num_prompt, position)
                tokens.append(sample(logits[row], before, num_prompt, history.sampling, position))
                row += 1
            results.append(Result(entry.sequence, first, tuple(tokens)))
        return tuple(results)

    def _unknown(self, sequence: SequenceId) -> StageFailed:
        return StageFailed(
            f"sequence {sequence} is not open on the stage of layers [{self._spec.first}, {self._spec.last})",
            hint="the sequence must be opened and replayed from its ids",
        )
