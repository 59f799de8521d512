"""A model spec says what a model is without its weights, and what these take on a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from shard.formats.affine import AffineForm
from transport.messages.ring import DTYPE_BYTES, DType, WeightsForm

Backend = Literal["torch", "mlx"]

WEIGHTS_VERSION = 2
"""Of what readers make of a file. Raised when they learn a quantized form: specs that were kept are made anew then."""

QUANTIZE_ON_LOAD_BITS: dict[WeightsForm, int] = {"4-bit": 4, "8-bit": 8}
_TORCH_GROUP_BYTES = 4
"""A scale and a zero, float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBlock:
    """Weights of one part of a model that are stored alike. `affine`: their quantized form, None for dense ones.
    `anew_group`: of dense matrices, the weights a scale would have if a stage quantized them; None: it would not."""

    elements: int
    affine: AffineForm | None = None
    anew_group: int | None = None

    def form_as(self, weights: WeightsForm) -> AffineForm | None:
        """The quantized form that a stage holds them in, None for dense."""
        if weights == "dense":
            return None
        if self.affine is None and self.anew_group is not None and weights in QUANTIZE_ON_LOAD_BITS:
            return AffineForm(bits=QUANTIZE_ON_LOAD_BITS[weights], group=self.anew_group, exact=False)
        return self.affine

    def loaded_bytes(self, backend: Backend, dtype: DType, weights: WeightsForm = "stored") -> int:
        """Memory on a stage that computes in `dtype`.

        torch packs up to 4 bits into 4 and more into 8, with a float16 scale and zero a group; MLX has the bits as
        they are, with a scale and a bias in the compute dtype.
        """
        form = self.form_as(weights)
        if form is None:
            return self.elements * DTYPE_BYTES[dtype]
        bits = form.bits if backend == "mlx" else 4 if form.bits <= 4 else 8
        group_bytes = 2 * DTYPE_BYTES[dtype] if backend == "mlx" else _TORCH_GROUP_BYTES
        return self.elements * bits // 8 + self.elements // form.group * group_bytes


WeightBlocks = tuple[WeightBlock, ...]


def merge_blocks(blocks: Iterable[WeightBlock]) -> WeightBlocks:
    """The same weights, those that are stored alike in one block; the largest first."""
    elements: Counter[tuple[AffineForm | None, int | None]] = Counter()
    for block in blocks:
        elements[block.affine, block.anew_group] += block.elements
    return tuple(
        WeightBlock(elements=count, affine=affine, anew_group=anew_group)
        for (affine, anew_group), count in elements.most_common()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartBytes:
    """What the parts of a model take on one kind of device. `head` counts also when it is tied to the embedding."""

    layers: tuple[int, ...]
    embed: int
    norm: int
    lm_head: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """How the weights of a model's parts are stored; `layers[i]` are layer i's. A tied head is the embedding again."""

    layers: tuple[WeightBlocks, ...]
    embed: WeightBlocks
    norm: WeightBlocks
    head: WeightBlocks
    version: int = WEIGHTS_VERSION

    def part_bytes(self, backend: Backend, dtype: DType, weights: WeightsForm) -> PartBytes:
        def taken(blocks: WeightBlocks) -> int:
            return sum(block.loaded_bytes(backend, dtype, weights) for block in blocks)

        return PartBytes(
            layers=tuple(map(taken, self.layers)),
            embed=taken(self.embed),
            norm=taken(self.norm),
            lm_head=taken(self.head),
        )


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
                total += parts.lm_head
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
