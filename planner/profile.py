"""What planning needs to know of a model: sizes of its parts, in elements, and where it may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from transport.messages import DTYPE_BYTES, DType

WINDOW_SLACK_TOKENS = 512
"""What a sliding-window layer holds beyond its window: room to go back, and the block that its buffer grows by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """Counts are in elements. `kv_elements_per_token[i]` and `windows[i]` (tokens; None: full attention) are layer i's.

    `head_params` is the output projection's, also when it is tied to the embedding: then both ends of a ring hold a
    copy, a single stage holds one. `legal_cuts` are the layer indices, without 0 and num_layers, where a stage may end.
    """

    name: str
    num_layers: int
    hidden_size: int
    context_tokens: int
    tied_embeddings: bool
    layer_params: tuple[int, ...]
    embed_params: int
    norm_params: int
    head_params: int
    kv_elements_per_token: tuple[int, ...]
    windows: tuple[int | None, ...]
    legal_cuts: tuple[int, ...]

    def weights_bytes(self, first: int, last: int, dtype: DType) -> int:
        """Memory for the weights of a stage with layers [first, last)."""
        total = _between(self.layer_params, first, last)
        if first == 0:
            total += self.embed_params
        if last == self.num_layers:
            total += self.norm_params
            if not (self.tied_embeddings and first == 0):
                total += self.head_params
        return total * DTYPE_BYTES[dtype]

    def kv_bytes(self, first: int, last: int, context_tokens: int, concurrency: int, dtype: DType) -> int:
        """Memory for the KV of `concurrency` sequences of `context_tokens` each."""
        held = _held_elements(self.kv_elements_per_token, self.windows, context_tokens)
        return _between(held, first, last) * concurrency * DTYPE_BYTES[dtype]

    def work_params(self, first: int, last: int) -> int:
        """Parameters that a decode step reads: the head is a matrix-vector product, the embedding one row."""
        total = _between(self.layer_params, first, last)
        if last == self.num_layers:
            total += self.norm_params + self.head_params
        return total


def _between(values: tuple[int, ...], first: int, last: int) -> int:
    """The sum of values[first:last]. A search asks for every pair, thousands of times."""
    sums = _running_sums(values)
    return sums[last] - sums[first]


@lru_cache(maxsize=64)
def _running_sums(values: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *accumulate(values))


@lru_cache(maxsize=64)
def _held_elements(per_token: tuple[int, ...], windows: tuple[int | None, ...], context_tokens: int) -> tuple[int, ...]:
    """KV elements of one sequence of `context_tokens`, for each layer."""
    return tuple(
        elements * (context_tokens if window is None else min(context_tokens, window + WINDOW_SLACK_TOKENS))
        for elements, window in zip(per_token, windows, strict=True)
    )
