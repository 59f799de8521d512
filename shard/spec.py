"""What a model is, without its weights: the facts that planning, loading and checking need."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from shard.weight_blocks import WEIGHTS_VERSION, Backend, ModelWeights, PartBytes, WeightBlock
from transport.messages import DTYPE_BYTES, DType, WeightsForm


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Counts are in elements (parameters); `weights` says how those are stored, from which bytes follow.

    `layer_params[i]` are the parameters of layer i; `kv_elements_per_token[i]` is 2 · kv_heads · head_dim of layer i;
    `windows[i]` is the sliding window of layer i in tokens, None for full attention.
    `head_params` is the output projection's, also when tied to the embedding (each end then holds a copy).
    `legal_cuts` are the layer indices where the model may be split: all of 1 … num_layers - 1 unless layers share
    state. `weights`, `head_dim` None: written before it was known; weights are taken for dense. `stacked_experts`: the
    files hold all experts of a layer in one tensor.
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
    weights: ModelWeights | None = None
    stacked_experts: bool = False
    head_dim: int | None = None

    @property
    def is_current(self) -> bool:
        """False if the record should be made anew from the files."""
        return self.head_dim is not None and self.weights is not None and self.weights.version == WEIGHTS_VERSION

    def part_bytes(self, backend: Backend, dtype: DType, weights: WeightsForm) -> PartBytes:
        """What each part takes on a stage that computes in `dtype` and holds its matrices in the form `weights`."""
        return (self.weights or self._dense()).part_bytes(backend, dtype, weights)

    def stage_weights_bytes(
        self, first: int, last: int, dtype: DType, *, backend: Backend = "torch", weights: WeightsForm = "stored"
    ) -> int:
        """Bytes of layers [first, last) with the embedding, norm and head where that stage holds them."""
        parts = self.part_bytes(backend, dtype, weights)
        total = sum(parts.layers[first:last])
        if first == 0:
            total += parts.embed
        if last == self.num_layers:
            total += parts.norm
            if not (self.tied_embeddings and first == 0):
                total += parts.head
        return total

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
        return msgspec.convert(data, cls)

    def _dense(self) -> ModelWeights:
        return ModelWeights(
            layers=tuple((WeightBlock(elements=count),) for count in self.layer_params),
            embed=(WeightBlock(elements=self.embed_params),),
            norm=(WeightBlock(elements=self.norm_params),),
            head=(WeightBlock(elements=self.head_params),),
        )
