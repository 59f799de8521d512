"""Which layers are alike, and a few real ones that are run step after step and timed within a budget."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shard.formats.checkpoint import Checkpoint, loaded_form
from shard.formats.spec import Backend, ModelSpec
from shard.stage import StageInput, StageSpec
from shard.worker.load import load_shard
from shard.worker.local_stage import LocalStage
from transport.messages.ring import DType, Entry, Open, Release, Sampling, SequenceId, WeightsForm

_MAX_PAUSE_S = 0.008
_MIN_PAUSE_S = 0.001


def interquartile_mean(samples: Sequence[float]) -> float:
    """The mean of the middle half.

    Under a CPU quota the times of one step have several modes: a median would pick one of them, and be wrong for the
    sum of many steps; the plain mean would keep what another program did to a few.
    """
    ordered = sorted(samples)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


class SampleTimer:
    """Spends `budget_s` over all points of a profile: each gets a share of it, and at least one sample.

    Between samples it sleeps about as long as the step took: a stage of a ring waits for its turn as well, while
    its CPU quota fills up again and its cores doze off.
    """

    def __init__(
        self,
        budget_s: float,
        *,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.budget_s = budget_s
        self._now = now
        self._sleep = sleep

    def sample(self, runs: Sequence[Callable[[], float]], *, share: float, max_samples: int = 16) -> list[float]:
        """Run all of `runs` in turn, over and over, for `share` of the budget; a typical time of each.

        In turn, so that a machine that gets slower meanwhile does so for all of them.
        """
        samples: list[list[float]] = [[] for _ in runs]
        ends_at = self._now() + share * self.budget_s
        while len(samples[0]) < max_samples:
            for run, taken in zip(runs, samples, strict=True):
                seconds = run()
                taken.append(seconds)
                self._sleep(min(max(seconds, _MIN_PAUSE_S), _MAX_PAUSE_S))
            # Another round must fit: a slow device would overshoot by a whole one.
            if self._now() + sum(taken[-1] for taken in samples) > ends_at:
                break
        return [interquartile_mean(taken) for taken in samples]


_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)")
_COLD_BYTES = 64 << 20
"""Weights read between two visits of a layer: beyond the caches of home machines."""
_MAX_LAYERS_MEASURED = 32
"""For the time that loading takes. Quantized layers of a small model need this many to leave a cache of 32 MB."""


def layer_kinds(checkpoint: Checkpoint, weights: WeightsForm) -> tuple[int, ...]:
    """The kind of each layer. Layers of a kind have tensors of equal names and shapes, held in equal forms (a file may
    store some layers in more bits), the same window and KV."""
    spec = checkpoint.spec
    held: list[set[tuple[str, tuple[int, ...], tuple[int, int] | None]]] = [set() for _ in range(spec.num_layers)]
    for name, tensor in checkpoint.tensors.items():
        match = _LAYER.search(name)
        if match is not None and int(match[1]) < spec.num_layers:
            form = loaded_form(tensor, weights)
            held[int(match[1])].add((match[2], tuple(tensor.shape), None if form is None else (form.bits, form.group)))
    numbers: dict[object, int] = {}
    return tuple(
        numbers.setdefault(
            (frozenset(held[layer]), spec.windows[layer], spec.kv_elements_per_token[layer]), len(numbers)
        )
        for layer in range(spec.num_layers)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpan:
    """Layers [first, last)."""

    first: int
    last: int

    @property
    def num_layers(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSpans:
    """What to load: a `run` of consecutive layers, and for each kind the shortest stage that has a layer of it."""

    run: LayerSpan
    singles: tuple[LayerSpan, ...]


def choose_spans(
    spec: ModelSpec, kinds: Sequence[int], layer_bytes: Sequence[int], memory_bytes: int | None = None
) -> MeasuredSpans:
    """`layer_bytes[i]` is what layer i takes. The run is long enough to leave the caches, at least 2 layers where the
    model has them, and starts where it covers most kinds; all ends are legal cuts. Run and singles take at most
    `memory_bytes`, if at all possible."""
    spans = _legal_spans(spec)
    singles = tuple(
        min(
            (span for span in spans if kind in kinds[span.first : span.last]),
            # In the middle rather than at an end: stages with the embedding or the head are measured apart.
            key=lambda span: (span.num_layers, span.first == 0, span.last == spec.num_layers, span.first),
        )
        for kind in range(max(kinds) + 1)
    )
    mean_bytes = max(1, sum(layer_bytes) // spec.num_layers)
    wanted = min(max(2, -(-_COLD_BYTES // mean_bytes)), _MAX_LAYERS_MEASURED, spec.num_layers)
    if memory_bytes is not None:
        wanted = max(min(wanted, memory_bytes // mean_bytes - len(singles)), min(2, spec.num_layers))
    run = min(
        (_extend_span(spans, index, wanted) for index in range(len(spans))),
        key=lambda span: (
            abs(span.num_layers - wanted),
            -len(set(kinds[span.first : span.last])),
            span.first == 0,
            span.last == spec.num_layers,
            span.first,
        ),
    )
    return MeasuredSpans(run=run, singles=singles)


def shortest_end_span(spec: ModelSpec, *, first: bool) -> LayerSpan:
    """The shortest stage at the model's first or last layer."""
    return _legal_spans(spec)[0 if first else -1]


def _legal_spans(spec: ModelSpec) -> list[LayerSpan]:
    ends = [0, *spec.legal_cuts, spec.num_layers]
    return [LayerSpan(first=first, last=last) for first, last in itertools.pairwise(ends)]


def _extend_span(spans: Sequence[LayerSpan], index: int, wanted: int) -> LayerSpan:
    """From spans[index] on, until there are `wanted` layers."""
    last = next((span.last for span in spans[index:] if span.last - spans[index].first >= wanted), spans[-1].last)
    return LayerSpan(first=spans[index].first, last=last)


_NO_BOUND = 1 << 30


class TimedStage:
    """Layers `span` of a checkpoint behind LocalStage. Inputs are random: no layer's time depends on their values,
    but for the choice of experts, which random inputs spread as real ones do."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: LayerSpan,
        *,
        backend: Backend,
        device: str,
        dtype: DType,
        weights: WeightsForm = "stored",
    ) -> None:
        model = checkpoint.spec
        self.spec = StageSpec(
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
        return self._backend.kv.length(sequence)

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
            Entry(sequence, self._backend.kv.length(sequence), ids, min(num_logits, num_tokens))
            for sequence in sequences
        )
        work = StageInput(ops=(), entries=entries, hidden=self._hidden(len(sequences) * num_tokens))
        started = time.perf_counter()
        self._stage.forward(work)
        return time.perf_counter() - started

    def time_first_chunk(self, num_tokens: int) -> float:
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
            self._inputs[num_tokens] = self._random_hidden(num_tokens)
        return self._inputs[num_tokens]

    def _random_hidden(self, num_tokens: int) -> np.ndarray:
        values = self._random.standard_normal((num_tokens, self._hidden_size), dtype=np.float32)
        if self.spec.wire_dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(np.float16 if self.spec.wire_dtype == "float16" else np.float32)


def max_window(windows: Sequence[int | None]) -> int | None:
    """What the layers can look back at: None where one of them sees everything."""
    known = [window for window in windows if window is not None]
    return max(known) if known and len(known) == len(windows) else None
