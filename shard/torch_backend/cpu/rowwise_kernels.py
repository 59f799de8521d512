"""Kernels of what lies between projections: root-mean-square norms and gated activations, row by row."""

from __future__ import annotations

from llvmlite import ir

from shard.torch_backend.cpu.ir_builder import F32, I64, PTR, Kernel, Value, f32, filled, i64, vector
from shard.torch_backend.cpu.vector_math import WIDTH, exp, sum_of

NORM_FIELDS = ("x", "added", "weight", "y", "rows", "width", "eps")
"""`eps` as the bits of a float64; `added` may be 0."""
GATED_FIELDS = ("gate_up", "y", "rows", "width", "gate_up_row_bytes")

_FLOATS = vector(F32, WIDTH)
_GELU_FACTOR = 0.7978845608028654  # √(2 / π)
_GELU_CUBE = 0.044715


def read_fields(kernel: Kernel, names: tuple[str, ...], pointers: tuple[str, ...]) -> dict[str, Value]:
    """A kernel's fields: 64-bit numbers, some of which are addresses."""
    fields = {name: kernel.load(kernel.at(kernel["fields"], 8 * i), I64, 8) for i, name in enumerate(names)}
    for name in pointers:
        fields[name] = kernel.builder.inttoptr(fields[name], PTR)
    return fields


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
