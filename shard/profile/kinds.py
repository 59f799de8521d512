"""Which layers of a model are alike, and which of them are measured for all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shard.checkpoint import Checkpoint
from shard.spec import ModelSpec
from shard.stored_bytes import held_form
from transport.messages import WeightsForm

_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)")
_COLD_BYTES = 64 << 20
"""Weights read between two visits of a layer: beyond the caches of home machines."""
_MOST_LAYERS = 32
"""For the time that loading takes. Quantized layers of a small model need this many to leave a cache of 32 MB."""


def layer_kinds(checkpoint: Checkpoint, weights: WeightsForm) -> tuple[int, ...]:
    """The kind of each layer. Layers of a kind have tensors of equal names and shapes, held in equal forms (a file may
    store some layers in more bits), the same window and KV."""
    spec = checkpoint.spec
    held: list[set[tuple[str, tuple[int, ...], tuple[int, int] | None]]] = [set() for _ in range(spec.num_layers)]
    for name, tensor in checkpoint.tensors.items():
        match = _LAYER.search(name)
        if match is not None and int(match[1]) < spec.num_layers:
            form = held_form(tensor, weights)
            held[int(match[1])].add((match[2], tuple(tensor.shape), None if form is None else (form.bits, form.group)))
    numbers: dict[object, int] = {}
    return tuple(
        numbers.setdefault(
            (frozenset(held[layer]), spec.windows[layer], spec.kv_elements_per_token[layer]), len(numbers)
        )
        for layer in range(spec.num_layers)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Layers [first, last)."""

    first: int
    last: int

    @property
    def num_layers(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to load: a `run` of consecutive layers, and for each kind the shortest stage that has a layer of it."""

    run: Span
    singles: tuple[Span, ...]


def choose(
    spec: ModelSpec, kinds: Sequence[int], layer_bytes: Sequence[int], memory_bytes: int | None = None
) -> Choice:
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
    wanted = min(max(2, -(-_COLD_BYTES // mean_bytes)), _MOST_LAYERS, spec.num_layers)
    if memory_bytes is not None:
        wanted = max(min(wanted, memory_bytes // mean_bytes - len(singles)), min(2, spec.num_layers))
    run = min(
        (_grown(spans, index, wanted) for index in range(len(spans))),
        key=lambda span: (
            abs(span.num_layers - wanted),
            -len(set(kinds[span.first : span.last])),
            span.first == 0,
            span.last == spec.num_layers,
            span.first,
        ),
    )
    return Choice(run=run, singles=singles)


def end_span(spec: ModelSpec, *, first: bool) -> Span:
    """The shortest stage at the model's first or last layer."""
    return _legal_spans(spec)[0 if first else -1]


def _legal_spans(spec: ModelSpec) -> list[Span]:
    ends = [0, *spec.legal_cuts, spec.num_layers]
    return [Span(first=first, last=last) for first, last in itertools.pairwise(ends)]


def _grown(spans: Sequence[Span], index: int, wanted: int) -> Span:
    """From spans[index] on, until there are `wanted` layers."""
    last = next((span.last for span in spans[index:] if span.last - spans[index].first >= wanted), spans[-1].last)
    return Span(first=spans[index].first, last=last)
