"""What a model is, without its weights: the facts that planning, loading and checking need."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transport.messages import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Counts are in elements (parameters), so that bytes follow from the dtype a stage computes in.

    `layer_params[i]` are the parameters of layer i; `kv_elements_per_token[i]` is 2 · kv_heads · head_dim of layer i;
    `windows[i]` is the sliding window of layer i in tokens, None for full attention.
    `head_params` is the output projection's, also when tied to the embedding (each end then holds a copy).
    `legal_cuts` are the layer indices where the model may be split: all of 1 … num_layers - 1 unless layers share
    state.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int
    tied_embeddings: bool
    layer_params: tuple[int, ...]
    embed_params: int
    norm_params: int
    head_params: int
    kv_elements_per_token: tuple[int, ...]
    windows: tuple[int | None, ...]
    legal_cuts: tuple[int, ...]
    stored_dtype: str
    file_bytes: int

    def stage_params(self, first: int, last: int) -> int:
        """Parameters of layers [first, last) with the embedding, norm and head where that stage holds them."""
        total = sum(self.layer_params[first:last])
        if first == 0:
            total += self.embed_params
        if last == self.num_layers:
            total += self.norm_params
            if not (self.tied_embeddings and first == 0):
                total += self.head_params
        return total

    def stage_weights_bytes(self, first: int, last: int, dtype: str) -> int:
        return self.stage_params(first, last) * DTYPE_BYTES[dtype]

    def stage_kv_bytes(self, first: int, last: int, tokens: int, dtype: str) -> int:
        """Bytes of KV for `tokens` positions of one sequence over layers [first, last)."""
        held = (
            elements * (tokens if window is None else min(tokens, window))
            for elements, window in zip(self.kv_elements_per_token[first:last], self.windows[first:last], strict=True)
        )
        return sum(held) * DTYPE_BYTES[dtype]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**fields)
