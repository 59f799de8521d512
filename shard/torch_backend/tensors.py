"""Torch tensors and what fills them: dtypes, NumPy views, and the checkpoint's names of each parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from shard.formats.checkpoint import Checkpoint, TensorInfo
from shard.formats.families import ExpertNames
from transport.errors import BadCheckpoint
from transport.messages.ring import DType

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def to_torch(array: np.ndarray, dtype: DType) -> torch.Tensor:
    """A tensor of `dtype` over the array's memory, or over a copy of a read-only one: torch has no such tensors."""
    writable = array if array.flags.writeable else array.copy()
    tensor = torch.from_numpy(writable)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The array over a CPU tensor's memory; bfloat16 as uint16 bits."""
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: np.ndarray = bits.numpy()
    return array


_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Text models inside vision-language checkpoints carry one of these before or in place of "model.".
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """Tensor `name` of `shape` fills `parameter[index]`: a contiguous slice, or all of it for `()`."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()


class TensorNames:
    """Finds checkpoint tensors for parameters named as transformers names them, with layers counted from `first`."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        *,
        first: int,
        tied_embeddings: bool,
        experts: ExpertNames | None = None,
    ) -> None:
        self._tensors = tensors
        self._first = first
        self._tied = tied_embeddings
        self._experts = experts
        self._prefix = next((p for p in _PREFIXES if p + "embed_tokens.weight" in tensors), "model.")

    def embedding(self) -> str:
        return self._prefix + "embed_tokens.weight"

    def lm_head(self) -> str:
        """The output projection: the embedding, where the model ties them."""
        if self._tied:
            return self.embedding()
        return self._prefix.removesuffix("model.") + "lm_head.weight"

    def parts(self, parameter: str, shape: tuple[int, ...]) -> tuple[TensorPart, ...]:
        """The parts that fill `parameter` ("model.layers.0.mlp.experts.gate_up_proj") of `shape`, each tensor once.

        Raises BadCheckpoint naming the first tensor that is missing or has another shape.
        """
        if parameter == "lm_head.weight":
            name = self.lm_head()
        else:
            shifted = _LAYER.sub(lambda match: f"model.layers.{int(match[1]) + self._first}.", parameter)
            name = self._prefix + shifted.removeprefix("model.")
        if name not in self._tensors:
            return self._expert_parts(name, shape)
        return (self._part(name, shape),)

    def _expert_parts(self, name: str, shape: tuple[int, ...]) -> tuple[TensorPart, ...]:
        block, experts, kind = name.partition(".mlp.experts.")
        names = self._experts
        if names is None:
            return (self._part(name, shape),)
        if not experts:  # A router, say: Mixtral's files say `block_sparse_moe` where its modules say `mlp`.
            return (self._part(name.replace(".mlp.", f".{names.block}."), shape),)
        num_experts, inner = shape[0], shape[1:]
        if kind == "down_proj":
            return tuple(
                self._part(f"{block}.{names.tensor(expert, kind)}", inner, (expert,)) for expert in range(num_experts)
            )
        if kind == "gate_up_proj":
            half = inner[0] // 2
            return tuple(
                self._part(f"{block}.{names.tensor(expert, projection)}", (half, *inner[1:]), (expert, rows))
                for expert in range(num_experts)
                for projection, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, 2 * half)))
            )
        return (self._part(name, shape),)

    def _part(self, name: str, shape: tuple[int, ...], index: tuple[int | slice, ...] = ()) -> TensorPart:
        info = self._tensors.get(name)
        if info is None:
            raise BadCheckpoint(
                f"the model's files have no tensor {name}", hint="the files are incomplete: pull the model again"
            )
        if tuple(info.shape) != tuple(shape):
            raise BadCheckpoint(
                f"tensor {name} has shape {list(info.shape)}; the model's config asks for {list(shape)}",
                hint="config.json and the weights do not belong together: pull the model again",
            )
        return TensorPart(name=name, shape=shape, index=index)


def total_file_bytes(tensors: Mapping[str, TensorInfo], parts: Iterable[TensorPart]) -> int:
    """What reading the parts takes from the files."""
    return sum(tensors[part.name].file_bytes for part in parts)


def read_part(checkpoint: Checkpoint, part: TensorPart, parameter: np.ndarray, dtype: DType) -> None:
    """Read the part straight into its place in `parameter`, an array over the parameter's own memory."""
    out = parameter[part.index] if part.index else parameter
    checkpoint.read_into(part.name, out, dtype)
