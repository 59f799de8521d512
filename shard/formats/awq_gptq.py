"""The logical tensors of a folder quantized with AWQ (version gemm) or GPTQ.

Both hold a matrix transposed, [inputs, outputs], in int32 words: AWQ packs eight outputs into one, in the order of
`_AWQ_ORDER` (AutoAWQ, awq/modules/linear/gemm.py); GPTQ packs inputs (AutoGPTQ, qlinear_cuda.py). w = s · (q - zero).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shard.formats.affine import AFFINE_GROUPS, AffineForm, AffineRows
from shard.formats.checkpoint import TensorInfo
from shard.formats.dtypes import unpack_words
from shard.formats.families import family_of
from shard.formats.quantization import (
    SCALE_FORMATS,
    DenseTensor,
    LogicalTensor,
    PackedQuantization,
    shape_error,
    sibling,
)
from shard.formats.safetensors import PlacedTensor, SafetensorsFiles
from transport.errors import BadCheckpoint, UnsupportedModel

_PACKED = ".qweight"
_PARTS = (_PACKED, ".qzeros", ".scales", ".g_idx")
# Nibble i of an AWQ word is of output _AWQ_ORDER[i].
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_WORD_FORMATS = ("I32", "U32")


@dataclass(frozen=True, slots=True, kw_only=True)
class _TensorParts:
    """One tensor as the files have it: words uint32, scales and zeros float32 [groups, outputs]."""

    name: str
    words: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


@dataclass(slots=True)
class _LastTensorCache:
    """A row is a column in the file: the tensor read last is held, so that its next rows are not read again."""

    parts: _TensorParts | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, name: str, read: Callable[[], _TensorParts]) -> _TensorParts:
        with self.lock:
            if self.parts is None or self.parts.name != name:
                self.parts = None  # Freed before the next one is allocated.
                self.parts = read()
            return self.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """`repeat`: how many of the form's groups a stored group makes."""

    info: TensorInfo
    method: str
    form: AffineForm
    repeat: int
    zero_offset: int
    qweight: PlacedTensor
    qzeros: PlacedTensor
    scales: PlacedTensor
    g_idx: PlacedTensor | None
    cache: _LastTensorCache

    def read(self, files: SafetensorsFiles, first: int, num_rows: int) -> AffineRows:
        held = self.cache.get(self.info.name, lambda: self._read_whole(files))
        last = first + num_rows
        if self.method == "AWQ":
            begin = first // 8
            q = _awq_columns(held.words[:, begin : -(-last // 8)])[:, first - 8 * begin : last - 8 * begin]
        else:
            # [words, outputs, numbers of a word] → [inputs, outputs]
            unpacked = unpack_words(held.words[:, first:last], self.form.bits)
            q = unpacked.swapaxes(1, 2).reshape(self.info.shape[1], num_rows)
        scales = held.scales[:, first:last]
        biases = -held.zeros[:, first:last] * scales
        return AffineRows(
            q=np.ascontiguousarray(q.T),
            scales=np.repeat(scales.T, self.repeat, axis=1),
            biases=np.repeat(biases.T, self.repeat, axis=1),
        )

    def check_order(self, files: SafetensorsFiles) -> None:
        """Raise UnsupportedModel unless the inputs' groups follow one another."""
        if self.g_idx is None:
            return
        group_of = np.empty(self.g_idx.shape, "<i4")
        files.read_bytes(self.g_idx, group_of)
        inputs = self.info.shape[1]
        if not np.array_equal(group_of, np.arange(inputs) // (self.form.group * self.repeat)):
            raise UnsupportedModel(
                f"{self.info.name} is quantized with GPTQ in act-order (desc_act): its groups are scattered",
                hint="take a GPTQ form made with desc_act false, or the model's GGUF, MLX or AWQ form",
            )

    def _read_whole(self, files: SafetensorsFiles) -> _TensorParts:
        self.check_order(files)
        words = np.empty(self.qweight.shape, "<u4")
        files.read_bytes(self.qweight, words)
        scales = np.empty(self.scales.shape, np.float32)
        files.read_floats(self.scales, 0, scales, "float32")
        packed_zeros = np.empty(self.qzeros.shape, "<u4")
        files.read_bytes(self.qzeros, packed_zeros)
        if self.method == "AWQ":
            zeros = _awq_columns(packed_zeros)
        else:
            zeros = unpack_words(packed_zeros, self.form.bits).reshape(scales.shape)
        held_zeros = zeros.astype(np.float32) + np.float32(self.zero_offset)
        return _TensorParts(name=self.info.name, words=words, scales=scales, zeros=held_zeros)


def packed_tensors(
    files: SafetensorsFiles, quantization: PackedQuantization, config: Mapping[str, Any]
) -> dict[str, LogicalTensor]:
    """Logical tensors by name. `config` says which projections have biases. Raises BadCheckpoint where parts of a
    tensor lack or do not fit, UnsupportedModel for act-order."""
    found: dict[str, LogicalTensor] = {}
    last_read = _LastTensorCache()
    for stored in files.placed.values():
        module = stored.name.removesuffix(_PACKED)
        tensor: LogicalTensor
        if module != stored.name:
            tensor = _packed_tensor(files, stored, module, quantization, last_read)
            if quantization.act_order:
                tensor.check_order(files)
        elif stored.name.endswith(_PARTS):
            if stored.name.rpartition(".")[0] + _PACKED not in files.placed:
                raise BadCheckpoint(
                    f"the files hold {stored.name}, but no packed weights for it",
                    hint="a file is missing; pull the model again",
                )
            continue
        elif _is_zero_bias(files, stored, config):
            continue
        else:
            tensor = DenseTensor.whole(stored)
        if tensor.info.name in found:
            raise BadCheckpoint(f"the files hold {tensor.info.name} packed and dense", hint="pull the model again")
        found[tensor.info.name] = tensor
    return found


def _is_zero_bias(files: SafetensorsFiles, stored: PlacedTensor, config: Mapping[str, Any]) -> bool:
    """Whether it is a bias of zeros, as AutoGPTQ wrote for layers without one, where the model has no place for it."""
    module = stored.name.removesuffix(".bias")
    if module == stored.name or module + _PACKED not in files.placed or len(stored.shape) != 1:
        return False
    in_attention = ".self_attn." in module
    if config.get("attention_bias" if in_attention else "mlp_bias"):
        return False
    if in_attention and family_of(config).qkv_bias and not module.endswith(".o_proj"):
        return False
    bias = np.empty(stored.shape, np.float32)
    files.read_floats(stored, 0, bias, "float32")
    return not bias.any()


def _packed_tensor(
    files: SafetensorsFiles,
    qweight: PlacedTensor,
    module: str,
    quantization: PackedQuantization,
    last_read: _LastTensorCache,
) -> PackedTensor:
    method, bits, per_word = quantization.method, quantization.bits, 32 // quantization.bits
    if qweight.format not in _WORD_FORMATS or len(qweight.shape) != 2 or 0 in qweight.shape:
        raise shape_error(qweight, f"as {qweight.format}, where a matrix of int32 words belongs")
    rows, columns = qweight.shape
    inputs, outputs = (rows, columns * per_word) if method == "AWQ" else (rows * per_word, columns)
    group = quantization.group or inputs
    form_group = next((size for size in reversed(AFFINE_GROUPS) if group % size == 0), None)
    if form_group is None or inputs % group:
        raise shape_error(qweight, f"whose {inputs} inputs can't be in groups of {group}")
    scales = sibling(files, qweight, f"{module}.scales", SCALE_FORMATS)
    if scales.shape != (inputs // group, outputs):
        raise shape_error(scales, f"but {qweight.name} in groups of {group} needs {(inputs // group, outputs)}")
    qzeros = sibling(files, qweight, f"{module}.qzeros", _WORD_FORMATS)
    if qzeros.shape != (inputs // group, outputs // per_word) or outputs % per_word:
        raise shape_error(qzeros, f"but {qweight.name} needs {(inputs // group, outputs // per_word)}")
    g_idx = None
    if method == "GPTQ" and f"{module}.g_idx" in files.placed:
        g_idx = sibling(files, qweight, f"{module}.g_idx", ("I32",))
        if g_idx.shape != (inputs,):
            raise shape_error(g_idx, f"but {qweight.name} has {inputs} inputs")
    elif quantization.act_order:
        sibling(files, qweight, f"{module}.g_idx", ("I32",))
    form = AffineForm(bits=bits, group=form_group)
    parts = (qweight, scales, qzeros) + (() if g_idx is None else (g_idx,))
    return PackedTensor(
        info=TensorInfo(
            name=f"{module}.weight",
            shape=(outputs, inputs),
            format=f"{method} {bits}-bit",
            file_bytes=sum(part.file_bytes for part in parts),
            affine=form,
        ),
        method=method,
        form=form,
        repeat=group // form_group,
        zero_offset=quantization.zero_offset,
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
        cache=last_read,
    )


def _awq_columns(words: np.ndarray) -> np.ndarray:
    """uint32 [inputs, outputs / 8] → uint8 [inputs, outputs]."""
    q = np.empty((*words.shape, 8), np.uint8)
    for nibble, output in enumerate(_AWQ_ORDER):
        q[..., output] = (words >> np.uint32(4 * nibble)) & np.uint32(15)
    return q.reshape(len(words), -1)
