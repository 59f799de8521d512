"""The logical tensors of a folder that mlx-lm may have written: packed weights with scales and biases, stacked experts.

Layout: `mx.quantize` (https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html): a row of
uint32 words is one stream of q, least significant bits first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shard.formats.affine import AffineForm, AffineRows
from shard.formats.checkpoint import TensorInfo
from shard.formats.dtypes import unpack_stream
from shard.formats.families import FAMILIES
from shard.formats.quantization import SCALE_FORMATS, DenseTensor, LogicalTensor, MlxQuantization, shape_error, sibling
from shard.formats.safetensors import PlacedTensor, SafetensorsFiles
from transport.errors import BadCheckpoint

_MAX_EXPERTS = 4096
_EXPERTS = {family.experts.block: family.experts for family in FAMILIES.values() if family.experts is not None}
_STACKED = re.compile(rf"(.+\.)({'|'.join(_EXPERTS)})\.switch_mlp\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxTensor:
    """Rows from `first_row` on of packed weights that are seen as a matrix, with their scales and biases."""

    info: TensorInfo
    form: AffineForm
    weight: PlacedTensor
    scales: PlacedTensor
    biases: PlacedTensor
    first_row: int

    def read(self, files: SafetensorsFiles, first: int, num_rows: int) -> AffineRows:
        at = self.first_row + first
        row_bytes = 4 * self.weight.shape[-1]
        packed = np.empty((num_rows, row_bytes), np.uint8)
        files.read_bytes(self.weight, packed, at * row_bytes)
        groups = self.scales.shape[-1]
        scales = np.empty((num_rows, groups), np.float32)
        biases = np.empty((num_rows, groups), np.float32)
        files.read_floats(self.scales, at * groups, scales, "float32")
        files.read_floats(self.biases, at * groups, biases, "float32")
        return AffineRows(q=unpack_stream(packed, self.form.bits), scales=scales, biases=biases)


def mlx_tensors(files: SafetensorsFiles, quantization: MlxQuantization | None) -> dict[str, LogicalTensor]:
    """Logical tensors by name; None for a folder that is not quantized. Raises BadCheckpoint where parts of a tensor
    lack or do not fit."""
    found: dict[str, LogicalTensor] = {}
    for stored in files.placed.values():
        module = stored.name.removesuffix(".weight")
        if quantization is not None and _belongs_to_weight(files, stored):
            continue
        if quantization is not None and (f"{module}.scales" in files.placed or stored.format == "U32"):
            made: Iterator[LogicalTensor] = _quantized_tensors(files, stored, quantization.form_of(module))
        else:
            made = _dense_tensors(stored)
        for tensor in made:
            if tensor.info.name in found:
                raise BadCheckpoint(f"the files hold {tensor.info.name} twice", hint="pull the model again")
            found[tensor.info.name] = tensor
    return found


def _belongs_to_weight(files: SafetensorsFiles, stored: PlacedTensor) -> bool:
    """Whether it holds scales or biases. (A layer's own bias is called `bias`.)"""
    module, _, leaf = stored.name.rpartition(".")
    if leaf not in ("scales", "biases"):
        return False
    if f"{module}.weight" not in files.placed:
        raise BadCheckpoint(
            f"the files hold {stored.name}, but no {module}.weight", hint="a file is missing; pull the model again"
        )
    return True


def _dense_tensors(stored: PlacedTensor) -> Iterator[DenseTensor]:
    names = _expert_names(stored)
    if names is None:
        yield DenseTensor.whole(stored)
        return
    shape = stored.shape[1:]
    for expert, name in enumerate(names):
        info = TensorInfo(name=name, shape=shape, format=stored.format, file_bytes=stored.file_bytes // stored.shape[0])
        yield DenseTensor(info=info, stored=stored, first_element=expert * math.prod(shape))


def _quantized_tensors(files: SafetensorsFiles, weight: PlacedTensor, form: AffineForm | None) -> Iterator[MlxTensor]:
    module = weight.name.removesuffix(".weight")
    scales = sibling(files, weight, f"{module}.scales", SCALE_FORMATS)
    biases = sibling(files, weight, f"{module}.biases", SCALE_FORMATS)
    if form is None:
        raise BadCheckpoint(
            f"config.json says that {module} is not quantized, but {scales.path} holds its scales",
            hint="config.json and the weights do not belong together: pull the model again",
        )
    if weight.format != "U32" or len(weight.shape) < 2 or math.prod(weight.shape) == 0:
        raise shape_error(weight, f"as {weight.format}, where packed rows of U32 belong")
    columns = weight.shape[-1] * 32 // form.bits
    expected = (*weight.shape[:-1], columns // form.group)
    if weight.shape[-1] * 32 % form.bits or columns % form.group:
        raise shape_error(weight, f"which no groups of {form.group} weights of {form.bits} bits can have")
    for tensor in (scales, biases):
        if tensor.shape != expected:
            raise shape_error(tensor, f"but {weight.name} in groups of {form.group} needs {expected}")
    experts = _expert_names(weight)
    names = [weight.name] if experts is None else experts
    shape = (*weight.shape[0 if experts is None else 1 : -1], columns)
    file_bytes = (weight.file_bytes + scales.file_bytes + biases.file_bytes) // len(names)
    for part, name in enumerate(names):
        info = TensorInfo(name=name, shape=shape, format=f"MLX {form.bits}-bit", file_bytes=file_bytes, affine=form)
        yield MlxTensor(
            info=info,
            form=form,
            weight=weight,
            scales=scales,
            biases=biases,
            first_row=part * math.prod(shape[:-1]),
        )


def _expert_names(stored: PlacedTensor) -> list[str] | None:
    """The names of the tensors, one an expert, that are stacked in this one; None for any other tensor."""
    match = _STACKED.fullmatch(stored.name)
    if match is None:
        return None
    if len(stored.shape) != 3 or not 1 <= stored.shape[0] <= _MAX_EXPERTS:
        raise shape_error(stored, "where [experts, rows, columns] belongs")
    names = _EXPERTS[match[2]]
    return [match[1] + names.tensor(expert, match[3]) for expert in range(stored.shape[0])]
