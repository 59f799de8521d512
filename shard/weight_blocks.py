"""What a model's weights take once they are loaded, by how they are stored and how a stage holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from shard.affine import AffineForm
from transport.messages import DTYPE_BYTES, DType, WeightsForm

Backend = Literal["torch", "mlx"]

WEIGHTS_VERSION = 2
"""Of what readers make of a file. Raised when they learn a quantized form: specs that were kept are made anew then."""

BITS_ANEW: dict[WeightsForm, int] = {"4-bit": 4, "8-bit": 8}
_TORCH_GROUP_BYTES = 4
"""A scale and a zero, float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBlock:
    """Weights of one part of a model that are stored alike. `affine`: their quantized form, None for dense ones.
    `anew_group`: of dense matrices, the weights a scale would have if a stage quantized them; None: it would not."""

    elements: int
    affine: AffineForm | None = None
    anew_group: int | None = None

    def held_as(self, weights: WeightsForm) -> AffineForm | None:
        """The quantized form that a stage holds them in, None for dense."""
        if weights == "dense":
            return None
        if self.affine is None and self.anew_group is not None and weights in BITS_ANEW:
            return AffineForm(bits=BITS_ANEW[weights], group=self.anew_group, exact=False)
        return self.affine

    def loaded_bytes(self, backend: Backend, dtype: DType, weights: WeightsForm = "stored") -> int:
        """Memory on a stage that computes in `dtype`.

        torch packs up to 4 bits into 4 and more into 8, with a float16 scale and zero a group; MLX has the bits as
        they are, with a scale and a bias in the compute dtype.
        """
        form = self.held_as(weights)
        if form is None:
            return self.elements * DTYPE_BYTES[dtype]
        bits = form.bits if backend == "mlx" else 4 if form.bits <= 4 else 8
        group_bytes = 2 * DTYPE_BYTES[dtype] if backend == "mlx" else _TORCH_GROUP_BYTES
        return self.elements * bits // 8 + self.elements // form.group * group_bytes


Blocks = tuple[WeightBlock, ...]


def merged(blocks: Iterable[WeightBlock]) -> Blocks:
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
    head: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """How the weights of a model's parts are stored; `layers[i]` are layer i's. A tied head is the embedding again."""

    layers: tuple[Blocks, ...]
    embed: Blocks
    norm: Blocks
    head: Blocks
    version: int = WEIGHTS_VERSION

    def part_bytes(self, backend: Backend, dtype: DType, weights: WeightsForm) -> PartBytes:
        def taken(blocks: Blocks) -> int:
            return sum(block.loaded_bytes(backend, dtype, weights) for block in blocks)

        return PartBytes(
            layers=tuple(map(taken, self.layers)),
            embed=taken(self.embed),
            norm=taken(self.norm),
            head=taken(self.head),
        )
