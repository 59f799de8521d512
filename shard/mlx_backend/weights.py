"""The modules of a stage are filled from a checkpoint, one tensor at a time, in MLX's own memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from shard.formats.affine import AFFINE_BITS, AFFINE_GROUPS, AffineForm
from shard.formats.checkpoint import Checkpoint, TensorInfo
from shard.formats.dtypes import store_floats
from transport.errors import BadCheckpoint, UnsupportedModel
from transport.messages.ring import DType


def packed_words(columns: int, bits: int) -> int:
    """uint32 words that a row takes; `columns` is a multiple of 32."""
    return columns * bits // 32


def pack(q: np.ndarray, bits: int, out: np.ndarray) -> None:
    """q uint8 [rows, columns], C-contiguous, all < 2^bits → `out` uint32 [rows, packed_words], C-contiguous."""
    packed = _pack_even_bits(q, bits) if bits in (2, 4, 8) else _pack_odd_bits(q, bits)
    out.reshape(-1).view(np.uint8)[...] = packed


def _pack_even_bits(q: np.ndarray, bits: int) -> np.ndarray:
    """Bits that divide a byte: neighbours share one, until bytes are full."""
    packed = q.reshape(-1)
    while bits < 8:
        pairs = packed.view("<u2")
        packed = (pairs | (pairs >> (8 - bits))).astype(np.uint8)
        bits *= 2
    return packed


def _pack_odd_bits(q: np.ndarray, bits: int) -> np.ndarray:
    """Any other bits: eight weights are a 64-bit word, of which `bits` bytes are left when the gaps are out."""
    words = q.reshape(-1).view("<u8")
    for width in (8, 16, 32):
        filled = bits * width // 8
        low = sum(((1 << filled) - 1) << shift for shift in range(0, 64, 2 * width))
        words = (words & np.uint64(low)) | ((words >> np.uint64(width - filled)) & np.uint64(low << filled))
    packed: np.ndarray = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return packed


Index = tuple[()] | tuple[int]

_PIECE_WEIGHTS = 1 << 19
_MAX_READERS = 4
_STORED: Mapping[DType, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.uint16}


class Parameter(Protocol):
    """What a module's weights are while they are read."""

    def read(self, checkpoint: Checkpoint, name: str, index: Index, note: Callable[[int], None]) -> None:
        """Fill `parameter[index]` from the tensor `name`; `note` is called with bytes of the file read since."""

    def arrays(self) -> dict[str, mx.array]:
        """The module's parameters by name, evaluated. Ends the filling."""


class DenseParameter:
    """An array of `dtype`; `name` is the module's for it."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType) -> None:
        self._name = name
        self._dtype = dtype
        self._array = _SharedArray(shape, _STORED[dtype])

    def read(self, checkpoint: Checkpoint, name: str, index: Index, note: Callable[[int], None]) -> None:
        checkpoint.read_into(name, self._array.view[index], self._dtype)
        note(checkpoint.tensors[name].file_bytes)

    def arrays(self) -> dict[str, mx.array]:
        return {self._name: self._array.floats(self._dtype)}


class AffineParameter:
    """Packed weights with scales and biases of `dtype`, read and packed in pieces by a few threads.

    `shape` is that of the numbers they stand for, [rows, columns] or [experts, rows, columns].
    """

    def __init__(self, shape: tuple[int, ...], form: AffineForm, dtype: DType) -> None:
        self._form = form
        self._dtype = dtype
        self._columns = shape[-1]
        groups = (*shape[:-1], shape[-1] // form.group)
        self._words = _SharedArray((*shape[:-1], packed_words(shape[-1], form.bits)), mx.uint32)
        self._scales = _SharedArray(groups, _STORED[dtype])
        self._biases = _SharedArray(groups, _STORED[dtype])

    def read(self, checkpoint: Checkpoint, name: str, index: Index, note: Callable[[int], None]) -> None:
        words, scales, biases = (part.view[index] for part in (self._words, self._scales, self._biases))
        file_bytes, num_rows = checkpoint.tensors[name].file_bytes, len(words)

        def piece(first: int) -> int:
            end = min(first + step, num_rows)
            rows = checkpoint.read_affine(name, first, end - first)
            pack(rows.q, self._form.bits, words[first:end])
            store_floats(rows.scales, scales[first:end], self._dtype)
            store_floats(rows.biases, biases[first:end], self._dtype)
            return file_bytes * end // num_rows - file_bytes * first // num_rows

        step = max(1, _PIECE_WEIGHTS // self._columns)
        pieces = range(0, num_rows, step)
        if len(pieces) == 1:
            note(piece(0))
            return
        with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as pool:
            for num_bytes in pool.map(piece, pieces):
                note(num_bytes)

    def arrays(self) -> dict[str, mx.array]:
        return {
            "weight": self._words.array,
            "scales": self._scales.floats(self._dtype),
            "biases": self._biases.floats(self._dtype),
        }


class _SharedArray:
    """An array of MLX's and a NumPy `view` of its memory, through which it is filled before MLX computes with it."""

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.array = mx.zeros(shape, dtype)
        mx.eval(self.array)
        self.view = np.array(self.array, copy=False)

    def floats(self, dtype: DType) -> mx.array:
        """The same memory, bits in uint16 taken as the bfloat16 that they are."""
        if dtype != "bfloat16":
            return self.array
        floats = self.array.view(mx.bfloat16)
        mx.eval(floats)
        return floats


_HINT = "take another quantization of this model, or run it on torch devices only"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSource:
    """A module of the stage and where its tensors are: `prefix` + parameter path, or a name per expert."""

    module: Any  # an mlx.nn.Module; mypy does not see through that package
    prefix: str
    experts: Mapping[str, str]

    def is_stacked(self, path: str) -> bool:
        """Whether a parameter holds all experts, one for each row of its first axis."""
        return path in self.experts

    def sources(self, path: str, num_rows: int) -> tuple[str, ...]:
        """The tensors that a parameter with `num_rows` on its first axis is made of."""
        if self.is_stacked(path):
            return tuple(self.prefix + self.experts[path].format(expert=expert) for expert in range(num_rows))
        return (self.prefix + path,)


def with_quantized_modules(part: ModuleSource, tensors: Mapping[str, TensorInfo], device: str) -> ModuleSource:
    """The part with MLX's quantized modules where its projections, experts or embeddings are quantized in the files,
    each as its own tensor is. Nothing is computed: the modules' numbers are for `fill` to give.

    Raises UnsupportedModel for a quantization that MLX has no kernels for.
    """
    forms: dict[str, dict[str, int]] = {}
    for path, module in part.module.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        names = part.sources(f"{path}.weight" if path else "weight", module.weight.shape[0])
        form = _common_form([tensors[name] for name in names if name in tensors], device)
        if form is not None:
            forms[path] = {"bits": form.bits, "group_size": form.group}
    if "" in forms:
        return replace(part, module=part.module.to_quantized(**forms[""]))
    nn.quantize(part.module, class_predicate=lambda path, _: forms.get(path, False))  # type: ignore[attr-defined]
    return part


def _common_form(tensors: list[TensorInfo], device: str) -> AffineForm | None:
    """How all of these tensors are quantized, None for dense ones."""
    by_form = {_form_text(tensor.affine): tensor for tensor in tensors}
    if len(by_form) > 1:
        raise UnsupportedModel(
            f"{device} holds the experts of a layer as one array, and these are quantized differently: "
            + ", ".join(f"{tensor.name} ({form})" for form, tensor in by_form.items()),
            hint=_HINT,
        )
    for form, tensor in by_form.items():
        affine = tensor.affine
        if affine is not None and (affine.bits not in AFFINE_BITS or affine.group not in AFFINE_GROUPS):
            raise UnsupportedModel(
                f"{device} can't run {tensor.name} as {form}: MLX has kernels for {_listed(AFFINE_BITS)} bits in "
                "groups of "
                f"{_listed(AFFINE_GROUPS)}",
                hint=_HINT,
            )
        return affine
    return None


def _form_text(form: AffineForm | None) -> str:
    return "dense" if form is None else f"{form.bits} bits in groups of {form.group}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"


Progress = Callable[[int, int], None]

# Computed from the config by every class; old checkpoints store them all the same.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParameterSource:
    """Parameter `name` of the part's module at `path` ("" is the module itself), and the tensors it is made of: itself,
    or one for each row of its first axis. `shape` is the numbers'; a quantized one has scales and biases besides."""

    part: ModuleSource
    path: str
    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    stacked: bool
    form: AffineForm | None

    def parameter(self, dtype: DType) -> Parameter:
        if self.form is None:
            return DenseParameter(self.name, self.shape, dtype)
        return AffineParameter(self.shape, self.form, dtype)


def load_weights(parts: list[ModuleSource], checkpoint: Checkpoint, dtype: DType, progress: Progress) -> int:
    """Give every parameter its values in `dtype`, evaluated, and return the bytes they take.

    Weights of a module that is quantized stay so. `progress(read_bytes, total_bytes)` counts the files' bytes.
    Raises BadCheckpoint for a tensor that is missing or misshapen, UnsupportedModel for one without a place.
    """
    slots = [slot for part in parts for slot in _parameter_sources(part)]
    _check(slots, parts, checkpoint)
    total_bytes = sum(checkpoint.tensors[name].file_bytes for slot in slots for name in slot.sources)
    read_bytes = weights_bytes = 0

    def note(num_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes += num_bytes
        progress(read_bytes, total_bytes)

    for slot in slots:
        parameter = slot.parameter(dtype)
        for index, name in enumerate(slot.sources):
            parameter.read(checkpoint, name, (index,) if slot.stacked else (), note)
        arrays = parameter.arrays()
        weights_bytes += sum(array.nbytes for array in arrays.values())
        slot.part.module.load_weights([(_joined(slot.path, key), array) for key, array in arrays.items()], strict=False)
    # Metal's allocator keeps freed buffers for reuse; what loading needed is of no use to decoding.
    mx.clear_cache()
    return weights_bytes


def _parameter_sources(part: ModuleSource) -> Iterator[_ParameterSource]:
    forms = {
        path: AffineForm(bits=module.bits, group=module.group_size)
        for path, module in part.module.named_modules()
        if hasattr(module, "group_size")
    }
    parameters: dict[str, mx.array] = dict(tree_flatten(part.module.parameters()))
    for path, parameter in parameters.items():
        owner, _, name = path.rpartition(".")
        shape = tuple(parameter.shape)
        form = forms.get(owner)
        if form is not None and name in ("scales", "biases"):
            continue
        if form is not None and name == "weight":
            shape = (*shape[:-1], shape[-1] * 32 // form.bits)
        yield _ParameterSource(
            part=part,
            path=owner,
            name=name,
            shape=shape,
            sources=part.sources(path, shape[0]),
            stacked=part.is_stacked(path),
            form=form if name == "weight" else None,
        )


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check(slots: list[_ParameterSource], parts: list[ModuleSource], checkpoint: Checkpoint) -> None:
    """All that can be known before reading: names and shapes, and that no tensor of these parts is left over."""
    hint = "the files are incomplete or of another model; pull it again"
    wanted: set[str] = set()
    for slot in slots:
        shape = slot.shape[1:] if slot.stacked else slot.shape
        for name in slot.sources:
            assert name not in wanted
            wanted.add(name)
            info = checkpoint.tensors.get(name)
            if info is None:
                raise BadCheckpoint(f"tensor {name} is missing", hint=hint)
            if tuple(info.shape) != shape:
                raise BadCheckpoint(f"tensor {name} has shape {tuple(info.shape)}; the config says {shape}", hint=hint)
    prefixes = tuple(part.prefix for part in parts)
    unused = (
        name
        for name in checkpoint.tensors
        if name.startswith(prefixes) and name not in wanted and not name.endswith(_IGNORED_SUFFIX)
    )
    if (leftover := next(unused, None)) is not None:
        raise UnsupportedModel(
            f"tensor {leftover} has no place in mlx-lm's model class: the output would be wrong",
            hint="run this model on torch devices only",
        )
