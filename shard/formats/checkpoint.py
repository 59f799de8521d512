"""A checkpoint is what a loader needs from a model's files, whatever their format.

Then views of one in the form that a stage holds: quantized on load, dense, dummy; and what each form takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from shard.formats.affine import AffineForm, AffineRows, quantize_rows
from shard.formats.dtypes import NUMPY_DTYPE, check_output, store_floats
from shard.formats.families import why_not_fused
from shard.formats.spec import QUANTIZE_ON_LOAD_BITS, Backend, ModelSpec, WeightBlock
from transport.errors import BadCheckpoint
from transport.messages.ring import DType, WeightsForm


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor under its Hugging Face name. `format` is a safetensors dtype ("BF16"), a GGUF type ("Q4_1"), or names
    another quantization ("MLX 4-bit"). `affine` is the quantized form it can be read in, None for a dense one."""

    name: str
    shape: tuple[int, ...]
    format: str
    file_bytes: int
    affine: AffineForm | None = None


class Checkpoint(Protocol):
    """A model on disk. `config` is the Hugging Face config.json (derived, for a GGUF)."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        """Fill `out` (C-contiguous, the tensor's shape; float32, float16, or uint16 for bfloat16 bits) from the file.

        Reads only this tensor's bytes, in blocks of rows, without a second copy of the whole, and leaves no file pages
        mapped. Raises BadCheckpoint for a missing, truncated or corrupt tensor.
        """

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        """As `read_into`, for rows [first, first + len(out)) of the tensor seen as a matrix [rows, columns]."""

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        """Rows [first, first + num_rows) of a tensor whose `affine` is not None, seen as a matrix [rows, columns].

        Several threads may read at once. Raises BadCheckpoint.
        """

    def close(self) -> None: ...


def matrix_rows(shape: tuple[int, ...]) -> int:
    """Rows of the tensor as a matrix [rows, columns]: all its axes but the last. A vector is one row."""
    return math.prod(shape[:-1])


def check_rows(name: str, shape: tuple[int, ...], first: int, num_rows: int) -> None:
    """Raise ValueError unless the tensor `name` has rows [first, first + num_rows)."""
    if not shape or not 0 <= first <= first + num_rows <= matrix_rows(shape):
        raise ValueError(f"{name} {shape} has no rows [{first}, {first + num_rows})")


def check_read(info: TensorInfo, first: int, out: np.ndarray, dtype: DType) -> None:
    """Raise ValueError unless `out` can take rows of the tensor from `first` on as `dtype`."""
    check_rows(info.name, info.shape, first, len(out))
    check_output(info.name, (len(out), info.shape[-1]), out, dtype)


def require_affine(info: TensorInfo) -> AffineForm:
    """The form in which the tensor is read. Raises ValueError for a dense one."""
    if info.affine is None:
        raise ValueError(f"{info.name} is not quantized")
    return info.affine


_BLOCK_ELEMENTS = 1 << 19
# What chooses the experts decides more than it weighs: it stays as it is.
_ROUTERS = (".gate.weight", ".router.weight", ".shared_expert_gate.weight")


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor is one of the matrices that quantization is for: a projection, expert, embedding or head."""
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(_ROUTERS) and "norm" not in name


def on_load_form(info: TensorInfo, bits: int) -> AffineForm | None:
    """What `QuantizeOnLoad` makes of the tensor; None for one that stays dense.

    Groups of 64 where the columns allow it, as mlx-lm's: 32 would lower a matrix's rms error by a seventh and take half
    a bit more a weight, for which a finer q lowers it by a third.
    """
    if info.affine is not None:
        return info.affine
    if not is_quantizable(info.name, info.shape) or info.shape[-1] % 32:
        return None
    return AffineForm(bits=bits, group=64 if info.shape[-1] % 64 == 0 else 32, exact=False)


class CheckpointView:
    """`checkpoint` as it is; each kind of view changes some of it. The caller goes on owning `checkpoint`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self._checkpoint.spec

    @property
    def config(self) -> dict[str, Any]:
        return self._checkpoint.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._checkpoint.tensors

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        self._checkpoint.read_into(name, out, dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        self._checkpoint.read_rows(name, first, out, dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        return self._checkpoint.read_affine(name, first, num_rows)

    def close(self) -> None:
        self._checkpoint.close()


class QuantizeOnLoad(CheckpointView):
    """`checkpoint` with its dense matrices quantized to `bits` when they are read, block by block; what is quantized
    already stays as it is. Dense reads give the dense numbers."""

    def __init__(self, checkpoint: Checkpoint, bits: int) -> None:
        super().__init__(checkpoint)
        self._bits = bits

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: replace(info, affine=on_load_form(info, self._bits))
            for name, info in self._checkpoint.tensors.items()
        }

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        inner = self._checkpoint.tensors.get(name)
        form = None if inner is None else self.tensors[name].affine
        if inner is None or inner.affine is not None or form is None:
            return super().read_affine(name, first, num_rows)
        columns = inner.shape[-1]
        step = max(1, _BLOCK_ELEMENTS // columns)
        buffer = np.empty((min(step, num_rows), columns), np.float32)
        made = AffineRows.empty(num_rows, columns, form.group)
        for done in range(0, num_rows, step):
            block = buffer[: num_rows - done]
            self._checkpoint.read_rows(name, first + done, block, "float32")
            rows = quantize_rows(block, form.bits, form.group)
            if not rows.fits_float16():
                raise BadCheckpoint(
                    f"{name} has numbers that are infinite, not a number or too large to quantize",
                    hint="pull the model again; if that does not help, the checkpoint itself is broken",
                )
            made.fill(done, rows)
        return made


class DenseView(CheckpointView):
    """`checkpoint` as if nothing in it were quantized: every tensor is read as numbers."""

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: replace(info, affine=None) for name, info in self._checkpoint.tensors.items()}

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        raise ValueError(f"{name} is held dense here: read its rows as numbers")


# A prime: no two rows are alike, as those of a router must not be.
_DRAWN = 65_521


class DummyWeights(CheckpointView):
    """`checkpoint` with small random numbers of the same shapes, formats and affine forms.

    Matrices are such that activations neither vanish nor grow from layer to layer, and norms near 1: denormal or
    infinite numbers would take other times. All are made of one drawn block, again and again.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        draw = np.random.default_rng(0)
        self._normal = draw.standard_normal(_DRAWN, dtype=np.float32)
        self._bytes = draw.integers(0, 256, _DRAWN, np.uint8)
        self._blocks: dict[tuple[DType, float, float], np.ndarray] = {}

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        info = self._info(name)
        check_output(name, info.shape, out, dtype)
        self._fill(info, out, dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        info = self._info(name)
        check_read(info, first, out, dtype)
        self._fill(info, out, dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        info = self._info(name)
        form = require_affine(info)
        check_rows(name, info.shape, first, num_rows)
        columns = info.shape[-1]
        rows = AffineRows.empty(num_rows, columns, form.group)
        levels = 2**form.bits - 1
        _repeat(self._bytes & levels if form.bits < 8 else self._bytes, rows.q)
        # Even over all levels, q has the deviation of levels / √12; the numbers' is to be 1 / √columns.
        rows.scales.fill(math.sqrt(12 / columns) / levels)
        rows.biases.fill(-math.sqrt(12 / columns) / 2)
        return rows

    def _info(self, name: str) -> TensorInfo:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise BadCheckpoint(f"the model has no tensor {name!r}", hint="a file is missing; pull the model again")
        return info

    def _fill(self, info: TensorInfo, out: np.ndarray, dtype: DType) -> None:
        if len(info.shape) > 1:
            mean, deviation = 0.0, 1 / math.sqrt(info.shape[-1])
        else:
            mean, deviation = (1.0 if "norm" in info.name else 0.0), 0.02
        _repeat(self._block(dtype, mean, deviation), out)

    def _block(self, dtype: DType, mean: float, deviation: float) -> np.ndarray:
        key = (dtype, mean, deviation)
        if key not in self._blocks:
            block = np.empty(_DRAWN, NUMPY_DTYPE[dtype])
            store_floats(self._normal * np.float32(deviation) + np.float32(mean), block, dtype)
            self._blocks[key] = block
        return self._blocks[key]


def _repeat(block: np.ndarray, out: np.ndarray) -> None:
    flat = out.reshape(-1)
    whole = flat.size // len(block)
    flat[: whole * len(block)].reshape(whole, len(block))[...] = block
    flat[whole * len(block) :] = block[: flat.size % len(block)]


def weight_block(info: TensorInfo) -> WeightBlock:
    # Its group does not depend on the bits.
    anew = on_load_form(info, QUANTIZE_ON_LOAD_BITS["8-bit"]) if info.affine is None else None
    return WeightBlock(
        elements=math.prod(info.shape), affine=info.affine, anew_group=None if anew is None else anew.group
    )


def loaded_form(info: TensorInfo, weights: WeightsForm) -> AffineForm | None:
    """The quantized form that a stage holds the tensor in, None for dense."""
    return weight_block(info).form_as(weights)


def loaded_bytes(info: TensorInfo, backend: Backend, dtype: DType, weights: WeightsForm = "stored") -> int:
    """What the tensor takes on a stage that computes in `dtype`."""
    return weight_block(info).loaded_bytes(backend, dtype, weights)


def supported_form(
    backend: Backend, config: Mapping[str, Any], weights: WeightsForm, *, stacked_experts: bool
) -> WeightsForm:
    """What a backend makes of the wish: torch's library path knows dense matrices only. `stacked_experts`: see
    ModelSpec."""
    if backend == "torch" and why_not_fused(config, stacked_experts=stacked_experts) is not None:
        return "dense"
    return weights
