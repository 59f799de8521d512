"""A few real layers, run step after step as a stage runs them, and timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from shard.checkpoint import Checkpoint
from shard.load import Backend, load_shard
from shard.local_stage import LocalStage
from shard.profile.kinds import Span
from shard.stage import ShardSpec, StageInput
from transport.messages import DType, Entry, Open, Release, Sampling, SequenceId, WeightsForm

_NO_BOUND = 1 << 30


class TimedStage:
    """Layers `span` of a checkpoint behind LocalStage. Inputs are random: no layer's time depends on their values,
    but for the choice of experts, which random inputs spread as real ones do."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        *,
        backend: Backend,
        device: str,
        dtype: DType,
        weights: WeightsForm = "stored",
    ) -> None:
        model = checkpoint.spec
        self.spec = ShardSpec(
            first=span.first,
            last=span.last,
            num_layers=model.num_layers,
            device=device,
            compute_dtype=dtype,
            wire_dtype=dtype,
            next_dtype=dtype,
            context_tokens=model.context_tokens,
            kv_capacity_tokens=_NO_BOUND,
            weights=weights,
        )
        self._backend = load_shard(checkpoint, self.spec, backend=backend)
        self._stage = LocalStage(self._backend)
        self._random = np.random.default_rng(0)
        self.window = max_window(model.windows[span.first : span.last])
        self._hidden_size, self._vocab_size = model.hidden_size, model.vocab_size
        self._inputs: dict[int, np.ndarray] = {}
        self._ids = itertools.count(1)

    @property
    def num_layers(self) -> int:
        return self.spec.last - self.spec.first

    @property
    def weights_bytes(self) -> int:
        return self._backend.weights_bytes

    def length(self, sequence: SequenceId) -> int:
        return self._backend.length(sequence)

    def open(self, count: int) -> tuple[SequenceId, ...]:
        """New, empty sequences."""
        sequences = tuple(SequenceId(next(self._ids)) for _ in range(count))
        self._open(sequences)
        return sequences

    def release(self, sequences: Sequence[SequenceId]) -> None:
        ops = tuple(Release(sequence) for sequence in sequences)
        self._stage.forward(StageInput(ops=ops, entries=(), hidden=None))

    def step(self, sequences: Sequence[SequenceId], num_tokens: int = 1, num_logits: int = 1) -> float:
        """Append `num_tokens` to each sequence in one step; the seconds it took. One that is full begins anew."""
        full = [one for one in sequences if self.length(one) + num_tokens > self.spec.context_tokens]
        if full:
            self.release(full)
            self._open(full)
        ids = tuple(self._random.integers(0, self._vocab_size, num_tokens).tolist())
        entries = tuple(
            Entry(sequence, self._backend.length(sequence), ids, min(num_logits, num_tokens)) for sequence in sequences
        )
        work = StageInput(ops=(), entries=entries, hidden=self._hidden(len(sequences) * num_tokens))
        started = time.perf_counter()
        self._stage.forward(work)
        return time.perf_counter() - started

    def fresh_chunk(self, num_tokens: int) -> float:
        """Seconds of the first chunk of a prompt."""
        sequences = self.open(1)
        try:
            return self.step(sequences, num_tokens, num_logits=0)
        finally:
            self.release(sequences)

    def _open(self, sequences: Sequence[SequenceId]) -> None:
        ops = tuple(Open(sequence, (), Sampling()) for sequence in sequences)
        self._stage.forward(StageInput(ops=ops, entries=(), hidden=None))

    def _hidden(self, num_tokens: int) -> np.ndarray | None:
        """Made once for each size: to draw numbers right before a step would use up a part of its CPU quota."""
        if self.spec.is_first:
            return None
        if num_tokens not in self._inputs:
            self._inputs[num_tokens] = self._drawn(num_tokens)
        return self._inputs[num_tokens]

    def _drawn(self, num_tokens: int) -> np.ndarray:
        values = self._random.standard_normal((num_tokens, self._hidden_size), dtype=np.float32)
        if self.spec.wire_dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(np.float16 if self.spec.wire_dtype == "float16" else np.float32)


def max_window(windows: Sequence[int | None]) -> int | None:
    """What the layers can look back at: None where one of them sees everything."""
    known = [window for window in windows if window is not None]
    return max(known) if known and len(known) == len(windows) else None
