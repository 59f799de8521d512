"""A model's tensors, as what the files hold for them: a stored tensor, a part of one, or several that go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shard.affine import AffineRows
from shard.checkpoint import TensorInfo
from shard.safetensors_files import FLOATS, SafetensorsFiles
from shard.safetensors_header import PlacedTensor
from transport.errors import BadCheckpoint

SCALE_FORMATS = tuple(FLOATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor:
    """The elements of `stored` from `first_element` on, as many as the shape has."""

    info: TensorInfo
    stored: PlacedTensor
    first_element: int = 0

    @classmethod
    def whole(cls, stored: PlacedTensor) -> DenseTensor:
        info = TensorInfo(name=stored.name, shape=stored.shape, format=stored.format, file_bytes=stored.file_bytes)
        return cls(info=info, stored=stored)


class QuantizedTensor(Protocol):
    """A tensor whose `info.affine` is not None."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self, files: SafetensorsFiles, first: int, num_rows: int) -> AffineRows:
        """Rows [first, first + num_rows). Several threads may read at once. Raises BadCheckpoint."""


LogicalTensor = DenseTensor | QuantizedTensor


def sibling(files: SafetensorsFiles, of: PlacedTensor, name: str, formats: tuple[str, ...]) -> PlacedTensor:
    """The tensor `name` that belongs to the packed weights `of`. Raises BadCheckpoint if it lacks or is of a format
    that is not among `formats`."""
    tensor = files.placed.get(name)
    if tensor is None:
        raise BadCheckpoint(
            f"{of.name} in {of.path} is packed, but the files hold no {name}",
            hint="a file is missing; pull the model again",
        )
    if tensor.format not in formats:
        raise BadCheckpoint(
            f"{name} in {tensor.path} is stored as {tensor.format}, where {' or '.join(formats)} belongs",
            hint="take another quantization of the model",
        )
    return tensor


def misshapen(tensor: PlacedTensor, expected: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{tensor.name} in {tensor.path} has the shape {tensor.shape}, {expected}",
        hint="config.json and the weights do not belong together: pull the model again",
    )
