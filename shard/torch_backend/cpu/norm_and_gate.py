"""What lies between projections on the CPU: root-mean-square norms and gated activations, row by row, one native call
each. First the kernels, then what calls them."""

from __future__ import annotations

import struct
from functools import cache
from typing import Literal

import torch
from llvmlite import ir

from shard.torch_backend.cpu.compile import CompiledModule, new_fields
from shard.torch_backend.cpu.ir_builder import F32, PTR, Kernel, Value, f32, filled, i64, read_fields, vector
from shard.torch_backend.cpu.program import Program
from shard.torch_backend.cpu.vector_math import WIDTH, exp, sum_of

NORM_FIELDS = ("x", "added", "weight", "y", "rows", "width", "eps")
"""`eps` as the bits of a float64; `added` may be 0."""
GATED_FIELDS = ("gate_up", "y", "rows", "width", "gate_up_row_bytes")

_FLOATS = vector(F32, WIDTH)
_GELU_FACTOR = 0.7978845608028654  # √(2 / π)
_GELU_CUBE = 0.044715


def write_norm(module: ir.Module) -> str:
    """x [rows, width] += added, where there is one; y = x · weight / √(mean(x²) + eps). Float32, contiguous, width a
    multiple of 16 (Zhang and Sennrich 2019)."""
    kernel = Kernel(module, "norm", [("fields", PTR)])
    builder = kernel.builder
    fields = read_fields(kernel, NORM_FIELDS, ("x", "weight", "y"))
    has_added = builder.icmp_unsigned("!=", fields["added"], i64(0))
    added = builder.inttoptr(fields["added"], PTR)
    width = fields["width"]
    row_bytes = builder.mul(width, i64(4))
    eps = builder.fptrunc(builder.bitcast(fields["eps"], ir.DoubleType()), F32)
    with kernel.loop(i64(0), fields["rows"]) as row:
        start = builder.mul(row, row_bytes)
        x, y, more = (kernel.at(pointer, start) for pointer in (fields["x"], fields["y"], added))
        with kernel.only_if(has_added), kernel.loop(i64(0), row_bytes, i64(4 * WIDTH)) as at:
            place = kernel.at(x, at)
            sums = builder.fadd(kernel.load(place, _FLOATS, 4), kernel.load(kernel.at(more, at), _FLOATS, 4))
            kernel.store(sums, place, 4)
        squares = kernel.variable(_FLOATS)
        builder.store(ir.Constant(_FLOATS, None), squares)
        with kernel.loop(i64(0), row_bytes, i64(4 * WIDTH)) as at:
            values = kernel.load(kernel.at(x, at), _FLOATS, 4)
            builder.store(kernel.fma(values, values, builder.load(squares, typ=_FLOATS)), squares)
        mean = builder.fdiv(sum_of(kernel, builder.load(squares, typ=_FLOATS)), builder.sitofp(width, F32))
        factor = builder.fdiv(f32(1.0), kernel.unary("sqrt", builder.fadd(mean, eps)))
        factors = kernel.splat(factor, WIDTH)
        with kernel.loop(i64(0), row_bytes, i64(4 * WIDTH)) as at:
            weight = kernel.load(kernel.at(fields["weight"], at), _FLOATS, 4)
            values = kernel.load(kernel.at(x, at), _FLOATS, 4)
            kernel.store(builder.fmul(builder.fmul(values, factors), weight), kernel.at(y, at), 4)
    kernel.finish()
    return "norm"


def write_gated(module: ir.Module, activation: str) -> str:
    """y = activation(gate) · up: gate_up [rows, 2 · width] with any distance between rows, y [rows, width]; width a
    multiple of 16. `activation`: "silu", or "gelu" in its tanh form."""
    kernel = Kernel(module, f"gated_{activation}", [("fields", PTR)])
    builder = kernel.builder
    fields = read_fields(kernel, GATED_FIELDS, ("gate_up", "y"))
    width_bytes = builder.mul(fields["width"], i64(4))
    with kernel.loop(i64(0), fields["rows"]) as row:
        gate = kernel.at(fields["gate_up"], builder.mul(row, fields["gate_up_row_bytes"]))
        up = kernel.at(gate, width_bytes)
        y = kernel.at(fields["y"], builder.mul(row, width_bytes))
        with kernel.loop(i64(0), width_bytes, i64(4 * WIDTH)) as at:
            g = kernel.load(kernel.at(gate, at), _FLOATS, 4)
            active = builder.fmul(g, _sigmoid(kernel, g if activation == "silu" else _gelu_argument(kernel, g)))
            kernel.store(builder.fmul(active, kernel.load(kernel.at(up, at), _FLOATS, 4)), kernel.at(y, at), 4)
    kernel.finish()
    return f"gated_{activation}"


def _sigmoid(kernel: Kernel, x: Value) -> Value:
    builder = kernel.builder
    one = filled(F32, WIDTH, 1.0)
    return builder.fdiv(one, builder.fadd(one, exp(kernel, builder.fneg(x))))


def _gelu_argument(kernel: Kernel, x: Value) -> Value:
    """gelu(x) = x · sigmoid(2 · √(2/π) · (x + 0.044715 x³)), as (1 + tanh u) / 2 = sigmoid(2u)."""
    builder = kernel.builder
    inner = kernel.fma(builder.fmul(x, x), filled(F32, WIDTH, _GELU_CUBE), filled(F32, WIDTH, 1.0))
    return builder.fmul(builder.fmul(x, inner), filled(F32, WIDTH, 2 * _GELU_FACTOR))


Activation = Literal["silu", "gelu"]


@cache
def _rowwise() -> CompiledModule:
    module = ir.Module("rowwise")
    write_norm(module)
    for activation in ("silu", "gelu"):
        write_gated(module, activation)
    return CompiledModule(module)


def is_whole_vectors(width: int) -> bool:
    """Whether rows of `width` can go through these kernels."""
    return width % WIDTH == 0


class CpuRmsNorm:
    """x · weight / √(mean(x²) + eps) over rows, weight float32 [width]."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight.contiguous()  # Kept: the kernel knows its address.
        self._run = _rowwise().run("norm")
        self._fields, self._address = new_fields(len(NORM_FIELDS))
        self._fields[2] = self._weight.data_ptr()
        self._fields[5] = weight.shape[0]
        self._fields[6] = struct.unpack("<q", struct.pack("<d", eps))[0]

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, width] float32, contiguous → the same shape. With `added`, it is first added to x, in place."""
        y = torch.empty_like(x)
        fields = self._fields
        fields[0] = x.data_ptr()
        fields[1] = 0 if added is None else added.data_ptr()
        fields[3] = y.data_ptr()
        fields[4] = x.shape[0]
        self._run(self._address)
        return y

    def add_to(self, program: Program, kind: str, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Put the norm of what x, and `added`, will hold into a program → where it will be, in the buffer of that
        kind."""
        y = program.rows(kind, *x.shape)
        fields, address = new_fields(len(NORM_FIELDS))
        fields[:] = list(self._fields)
        fields[0] = x.data_ptr()
        fields[1] = 0 if added is None else added.data_ptr()
        fields[3] = y.data_ptr()
        fields[4] = x.shape[0]
        program.keep(self)
        program.counts_rows(fields, 4)
        program.call(_rowwise().address("norm"), (fields, address))
        return y


class CpuGatedActivation:
    """activation(gate) · up for rows [gate | up]."""

    def __init__(self, activation: Activation) -> None:
        self._name = f"gated_{activation}"
        self._run = _rowwise().run(self._name)
        self._fields, self._address = new_fields(len(GATED_FIELDS))

    def supports(self, gate_up: torch.Tensor) -> bool:
        return gate_up.dtype == torch.float32 and gate_up.stride(1) == 1 and self.supports_width(gate_up.shape[1])

    def supports_width(self, both: int) -> bool:
        """Whether rows of gate and up together can be so wide."""
        return both % (2 * WIDTH) == 0

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [rows, 2 · width] float32 → [rows, width]."""
        rows, both = gate_up.shape
        y = torch.empty((rows, both // 2), dtype=torch.float32)
        fields = self._fields
        fields[0] = gate_up.data_ptr()
        fields[1] = y.data_ptr()
        fields[2] = rows
        fields[3] = both // 2
        fields[4] = gate_up.stride(0) * 4
        self._run(self._address)
        return y

    def add_to(self, program: Program, gate_up: torch.Tensor) -> torch.Tensor:
        """Put the gate of what `gate_up` will hold into a program → where it will be."""
        rows, both = gate_up.shape
        y = program.rows("gated", rows, both // 2)
        fields, address = new_fields(len(GATED_FIELDS))
        fields[:] = [gate_up.data_ptr(), y.data_ptr(), rows, both // 2, gate_up.stride(0) * 4]
        program.keep(self)
        program.counts_rows(fields, 2)
        program.call(_rowwise().address(self._name), (fields, address))
        return y
