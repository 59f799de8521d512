"""Float arithmetic that kernels share: exp, sums, transposes, and the floats that KV is held in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import factorial, log
from typing import Literal

from llvmlite import ir

from shard.torch_backend.cpu.ir_builder import F16, F32, I8, I16, I32, IrType, Kernel, Value, filled, vector
from transport.messages.ring import DType

KVDType = DType | Literal["int8"]
"""What numbers are kept as; 8 bits are integers, which a scale that is kept elsewhere goes with."""

WIDTH = 16
"""Floats that a kernel handles at once; the code generator splits them where vectors are shorter."""

LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first exact in few bits, so that x − n · ln 2 keeps its digits (Cody and Waite 1980).
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# 1/k!, the series of e^r on |r| ≤ ln 2 / 2: the first term left out is 2e-8 of the sum.
_SERIES = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_LOWEST, _HIGHEST = -87.0, 88.0


def exp(kernel: Kernel, x: Value) -> Value:
    """e^x of a float32 vector, to 3e-7 relative; e^-87 below that, e^88 above 88; NaN stays NaN."""
    builder, lanes = kernel.builder, x.type.count
    ints = vector(I32, lanes)
    x = _clamped(kernel, x)
    n = kernel.unary("rint", builder.fmul(x, filled(F32, lanes, LOG2_E)))
    r = kernel.fma(n, filled(F32, lanes, -_LN2_HIGH), x)
    r = kernel.fma(n, filled(F32, lanes, -_LN2_LOW), r)
    total = filled(F32, lanes, _SERIES[0])
    for coefficient in _SERIES[1:]:
        total = kernel.fma(total, r, filled(F32, lanes, coefficient))
    exponent = builder.shl(builder.add(builder.fptosi(n, ints), filled(I32, lanes, 127)), filled(I32, lanes, 23))
    return builder.fmul(total, builder.bitcast(exponent, x.type))


def power_of_two(kernel: Kernel, x: Value, degree: int) -> Value:
    """2^x of a float32 vector, x ≤ 126; 0 from −126 down; NaN stays NaN. Relative error 4e-5 at degree 4, 3e-7 at 6."""
    builder, lanes = kernel.builder, x.type.count
    ints = vector(I32, lanes)
    n = kernel.unary("rint", x)
    r = builder.fsub(x, n)
    total = filled(F32, lanes, _power_coefficient(degree))
    for power in reversed(range(degree)):
        total = kernel.fma(total, r, filled(F32, lanes, _power_coefficient(power)))
    exponent = builder.shl(builder.fptosi(n, ints), filled(I32, lanes, 23))
    result = builder.bitcast(builder.add(builder.bitcast(total, ints), exponent), x.type)
    is_some = builder.fcmp_unordered(">", x, filled(F32, lanes, -126.0))
    return builder.select(is_some, result, ir.Constant(x.type, None))


def _power_coefficient(power: int) -> float:
    """ln(2)^k / k!, the series of 2^r on |r| ≤ 1/2."""
    return log(2.0) ** power / factorial(power)


def softcapped(kernel: Kernel, x: Value, cap: float) -> Value:
    """cap · tanh(x / cap) of a float32 vector, as cap − 2 · cap / (1 + e^(2x / cap)); −∞ stays."""
    builder, lanes = kernel.builder, x.type.count
    doubled = exp(kernel, builder.fmul(x, filled(F32, lanes, 2.0 / cap)))
    below = builder.fdiv(filled(F32, lanes, 2.0 * cap), builder.fadd(doubled, filled(F32, lanes, 1.0)))
    capped = builder.fsub(filled(F32, lanes, cap), below)
    return builder.select(builder.fcmp_ordered(">", x, filled(F32, lanes, float("-inf"))), capped, x)


def _clamped(kernel: Kernel, x: Value) -> Value:
    builder, lanes = kernel.builder, x.type.count
    low, high = filled(F32, lanes, _LOWEST), filled(F32, lanes, _HIGHEST)
    # In this order, what is no number is neither below nor above, and stays.
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def float_bytes(held: KVDType) -> int:
    return {"float32": 4, "int8": 1}.get(held, 2)


def load_floats(kernel: Kernel, pointer: Value, dtype: KVDType, count: int) -> Value:
    """`count` numbers of `dtype` → float32 vector."""
    builder = kernel.builder
    if dtype == "int8":
        return builder.sitofp(kernel.load(pointer, vector(I8, count), 1), vector(F32, count))
    if dtype == "bfloat16":
        bits = builder.zext(kernel.load(pointer, vector(I16, count), 2), vector(I32, count))
        return builder.bitcast(builder.shl(bits, filled(I32, count, 16)), vector(F32, count))
    if dtype == "float16":
        return builder.fpext(kernel.load(pointer, vector(F16, count), 2), vector(F32, count))
    return kernel.load(pointer, vector(F32, count), 4)


def load_float16(kernel: Kernel, pointer: Value, count: int, *, native: bool) -> Value:
    """`count` finite float16 numbers → float32 vector, by an instruction (`native`) or by integers: moved into place as
    float32 they lack a factor of 2^112 in the exponent, subnormal ones too."""
    builder = kernel.builder
    if native:
        return builder.fpext(kernel.load(pointer, vector(F16, count), 2), vector(F32, count))
    bits = builder.zext(kernel.load(pointer, vector(I16, count), 2), vector(I32, count))
    sign = builder.shl(builder.and_(bits, filled(I32, count, 0x8000)), filled(I32, count, 16))
    magnitude = builder.shl(builder.and_(bits, filled(I32, count, 0x7FFF)), filled(I32, count, 13))
    value = builder.fmul(builder.bitcast(magnitude, vector(F32, count)), filled(F32, count, 2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(value, vector(I32, count)), sign), vector(F32, count))


def store_floats(kernel: Kernel, values: Value, pointer: Value, dtype: DType) -> None:
    """float32 vector → `dtype`, to the nearest, ties to even."""
    builder, count = kernel.builder, values.type.count
    if dtype == "bfloat16":
        bits = builder.bitcast(values, vector(I32, count))
        odd = builder.and_(builder.lshr(bits, filled(I32, count, 16)), filled(I32, count, 1))
        rounded = builder.add(bits, builder.add(odd, filled(I32, count, 0x7FFF)))
        kernel.store(builder.trunc(builder.lshr(rounded, filled(I32, count, 16)), vector(I16, count)), pointer, 2)
    elif dtype == "float16":
        kernel.store(builder.fptrunc(values, vector(F16, count)), pointer, 2)
    else:
        kernel.store(values, pointer, 4)


def sum_of(kernel: Kernel, values: Value) -> Value:
    """The sum of a float32 vector's elements, in halves: the order is the same everywhere."""
    return _reduce(kernel, values, kernel.builder.fadd)


def largest_of(kernel: Kernel, values: Value) -> Value:
    builder = kernel.builder
    return _reduce(kernel, values, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


def transposed(kernel: Kernel, rows: Sequence[Value]) -> list[Value]:
    """n vectors of n elements, a power of two → the n vectors of their columns.

    Each round exchanges blocks of half the size off the diagonal: row i and i + half of each group.
    """
    count = len(rows)
    found = list(rows)
    half = count // 2
    while half:
        for i in range(count):
            if i & half:
                continue
            a, b = found[i], found[i + half]
            low = [lane if not lane & half else count + lane - half for lane in range(count)]
            high = [lane + half if not lane & half else count + lane for lane in range(count)]
            found[i], found[i + half] = (
                kernel.builder.shuffle_vector(a, b, ir.Constant(vector(I32, count), mask)) for mask in (low, high)
            )
        half //= 2
    return found


def _reduce(kernel: Kernel, values: Value, combine: Callable[[Value, Value], Value]) -> Value:
    count = values.type.count
    while count > 1:
        half = count // 2
        low, high = (_select_lanes(kernel, values, range(first, first + half)) for first in (0, half))
        values = combine(low, high)
        count = half
    return kernel.builder.extract_element(values, ir.Constant(I32, 0))


def _select_lanes(kernel: Kernel, values: Value, indices: range) -> Value:
    mask: IrType = ir.Constant(vector(I32, len(indices)), list(indices))
    return kernel.builder.shuffle_vector(values, values, mask)
