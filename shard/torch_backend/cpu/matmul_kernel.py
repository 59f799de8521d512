"""The kernel of a quantized projection, y = x · Wᵀ over affine groups in integers; compiled when first needed."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Literal

from llvmlite import ir

from shard.torch_backend.cpu.compile import CompiledModule, InstructionSet, KernelFields, host_instruction_sets
from shard.torch_backend.cpu.ir_builder import (
    F32,
    I8,
    I32,
    I64,
    PTR,
    VOID,
    Kernel,
    Value,
    f32,
    filled,
    i64,
    read_fields,
    team_thread,
    vector,
)
from shard.torch_backend.cpu.program import Program
from shard.torch_backend.cpu.vector_math import load_float16

BLOCK = 32
"""Columns whose activations share a scale, and the unit in which weights are packed."""

Precision = Literal[16, 8]
PRECISIONS: tuple[Precision, ...] = (16, 8)
_LARGEST = {16: 32512.0, 8: 127.0}
_CHUNKS = (8, 4, 2, 1)

FACTOR_BYTES = 12
"""Of one block of one row: s, u and t in float32."""

# What a call gets: an array of 64-bit numbers.
FIELDS = (
    "weights", "x", "activations", "factors", "y",
    "rows", "blocks", "tiles", "x_row_bytes", "y_row_bytes", "rows_at_once", "group_blocks", "offset", "exponent",
)  # fmt: skip


def kernel_name(bits: int, precision: Precision) -> str:
    return f"linear_{bits}_{precision}"


def activation_bytes(precision: Precision) -> int:
    """Of one block of one row."""
    return BLOCK * precision // 8


def tile_bytes(blocks: int, group_blocks: int, bits: int, lanes: int) -> int:
    """Of `lanes` rows of weights: for each group its scales and zeros (float16), then its blocks."""
    return blocks // group_blocks * 4 * lanes + blocks * BLOCK * lanes * bits // 8


def write_linear(module: ir.Module, bits: int, precision: Precision, target: InstructionSet) -> None:
    """Functions of `fields`: NAME for one thread; NAME_quantize for one and then NAME_multiply_team for each of a team,
    or NAME_team for each of a team: all rows quantized together, which takes a barrier and pays for many rows."""
    name = kernel_name(bits, precision)
    quantize = _write_quantize(module, f"{name}_quantize_rows", precision)
    multiply = _write_multiply(module, f"{name}_multiply_tiles", bits, precision, target)
    for suffix, steps in (("", (quantize, multiply)), ("_quantize", (quantize,))):
        alone = Kernel(module, f"{name}{suffix}", [("fields", PTR)])
        fields = _read_matmul_fields(alone)
        for function in steps:
            alone.builder.call(function, [alone["fields"], i64(0), fields["rows" if function is quantize else "tiles"]])
        alone.finish()
    for suffix, steps in (("_team", (quantize, multiply)), ("_multiply_team", (multiply,))):
        team = Kernel(module, f"{name}{suffix}", [("fields", PTR)])
        fields = _read_matmul_fields(team)
        for function in steps:
            first, last = _thread_share(team, fields["rows" if function is quantize else "tiles"])
            team.builder.call(function, [team["fields"], first, last])
            if function is quantize:
                team.call("GOMP_barrier", VOID, [])
        team.finish()


def _thread_share(team: Kernel, whole: Value) -> tuple[Value, Value]:
    """[first, last) of `whole` for this thread of the team."""
    builder = team.builder
    index, size = team_thread(team)
    first, last = (builder.sdiv(builder.mul(whole, i), size) for i in (index, builder.add(index, i64(1))))
    return first, last


def _read_matmul_fields(kernel: Kernel) -> dict[str, Value]:
    return read_fields(kernel, FIELDS, ("weights", "x", "activations", "factors", "y"))


def _write_quantize(module: ir.Module, name: str, precision: Precision) -> Value:
    """(fields, first row, last row): float32 rows of x → integers and their factors."""
    kernel = Kernel(module, name, [("fields", PTR), ("first", I64), ("last", I64)])
    fields = _read_matmul_fields(kernel)
    builder = kernel.builder
    floats, ints = vector(F32, BLOCK), vector(I32, BLOCK)
    step = activation_bytes(precision)
    offset = builder.sitofp(fields["offset"], F32)
    # 2^-exponent, from its bits: what scales and zeros were multiplied by is taken out of the activations' factors.
    bits = builder.shl(builder.sub(i64(127), fields["exponent"]), i64(23))
    shrunk = builder.bitcast(builder.trunc(bits, I32), F32)
    with kernel.loop(kernel["first"], kernel["last"]) as row:
        x_row = kernel.at(fields["x"], builder.mul(row, fields["x_row_bytes"]))
        before = builder.mul(row, fields["blocks"])
        with kernel.loop(i64(0), fields["blocks"]) as block:
            x = kernel.load(kernel.at(x_row, builder.mul(block, i64(4 * BLOCK))), floats, 4)
            # Of a NaN this makes NaN, and so of the whole row: what is wrong shows.
            largest = kernel.call(f"llvm.vector.reduce.fmaximum.v{BLOCK}f32", F32, [kernel.unary("fabs", x)])
            scale = builder.fmul(largest, f32(1 / _LARGEST[precision]))
            # A block of zeros, or of numbers too small to divide by, is zeros.
            some = builder.fcmp_ordered(">", largest, f32(1e-30))
            inverse = builder.select(some, builder.fdiv(f32(_LARGEST[precision]), largest), f32(0.0))
            i = builder.fptosi(kernel.unary("rint", builder.fmul(x, kernel.splat(inverse, BLOCK))), ints)
            total = kernel.call(f"llvm.vector.reduce.add.v{BLOCK}i32", I32, [i])
            at = builder.add(before, block)
            out = kernel.at(fields["activations"], builder.mul(at, i64(step)))
            if precision == 16:
                high = builder.ashr(builder.add(i, filled(I32, BLOCK, 128)), filled(I32, BLOCK, 8))
                low = builder.sub(i, builder.shl(high, filled(I32, BLOCK, 8)))
                kernel.store(builder.trunc(high, vector(I8, BLOCK)), out)
                kernel.store(builder.trunc(low, vector(I8, BLOCK)), kernel.at(out, BLOCK))
            else:
                kernel.store(builder.trunc(i, vector(I8, BLOCK)), out)
            scale = builder.fmul(scale, shrunk)
            t = builder.fmul(scale, builder.sitofp(total, F32))
            factors = kernel.at(fields["factors"], builder.mul(at, i64(FACTOR_BYTES)))
            for position, factor in enumerate((scale, builder.fneg(builder.fmul(offset, t)), t)):
                kernel.store(factor, kernel.at(factors, 4 * position), 4)
    kernel.finish()
    return kernel.function


def _write_multiply(module: ir.Module, name: str, bits: int, precision: Precision, target: InstructionSet) -> Value:
    """(fields, first tile, last tile). Rows go in batches whose activations stay in the cache while the weights pass
    by; within a tile in chunks whose sums stay in registers."""
    kernel = Kernel(module, name, [("fields", PTR), ("first", I64), ("last", I64)])
    fields = _read_matmul_fields(kernel)
    builder = kernel.builder
    groups = builder.sdiv(fields["blocks"], fields["group_blocks"])
    block_bytes = BLOCK * target.lanes * bits // 8
    size = builder.add(builder.mul(groups, i64(4 * target.lanes)), builder.mul(fields["blocks"], i64(block_bytes)))
    with kernel.loop(i64(0), fields["rows"], fields["rows_at_once"]) as batch:
        batch_end = kernel.minimum(builder.add(batch, fields["rows_at_once"]), fields["rows"])
        with kernel.loop(kernel["first"], kernel["last"]) as tile:
            weights = kernel.at(fields["weights"], builder.mul(tile, size))
            y = kernel.at(fields["y"], builder.mul(tile, i64(4 * target.lanes)))
            row = kernel.variable(I64)
            builder.store(batch, row)
            for chunk in _CHUNKS:
                first = builder.load(row, typ=I64)
                last = builder.sub(batch_end, i64(chunk - 1))
                with kernel.loop(first, last, i64(chunk)) as begin:
                    _Tile(kernel, fields, bits, precision, target).chunk(weights, y, begin, chunk, groups)
                    builder.store(builder.add(begin, i64(chunk)), row)
    kernel.finish()
    return kernel.function


class _Tile:
    """Writes the innermost loops: `lanes` rows of weights times a few rows of activations."""

    def __init__(
        self, kernel: Kernel, fields: dict[str, Value], bits: int, precision: Precision, target: InstructionSet
    ) -> None:
        self._kernel = kernel
        self._fields = fields
        self._bits = bits
        self._precision = precision
        self._target = target
        self._lanes = target.lanes

    def chunk(self, weights: Value, y: Value, begin: Value, num_rows: int, groups: Value) -> None:
        kernel, builder, lanes = self._kernel, self._kernel.builder, self._lanes
        floats = vector(F32, lanes)
        sums = [kernel.variable(floats) for _ in range(num_rows)]
        for total in sums:
            builder.store(ir.Constant(floats, None), total)
        blocks = self._fields["blocks"]
        rows = [builder.add(begin, i64(row)) for row in range(num_rows)]
        activations = [
            kernel.at(self._fields["activations"], builder.mul(builder.mul(row, blocks), i64(self._step)))
            for row in rows
        ]
        factors = [
            kernel.at(self._fields["factors"], builder.mul(builder.mul(row, blocks), i64(FACTOR_BYTES))) for row in rows
        ]
        block_bytes = BLOCK * lanes * self._bits // 8
        group_blocks = self._fields["group_blocks"]
        group_bytes = builder.add(i64(4 * lanes), builder.mul(group_blocks, i64(block_bytes)))
        with kernel.loop(i64(0), groups) as group:
            packed = kernel.at(weights, builder.mul(group, group_bytes))
            scale, zero = (
                load_float16(kernel, kernel.at(packed, 2 * lanes * i), lanes, native=self._target.has_float16)
                for i in range(2)
            )
            first_block = builder.mul(group, group_blocks)
            with kernel.loop(i64(0), group_blocks) as block:
                q = self._unpacked(kernel.at(packed, builder.add(i64(4 * lanes), builder.mul(block, i64(block_bytes)))))
                at = builder.add(first_block, block)
                for row in range(num_rows):
                    dots = self._dots(q, kernel.at(activations[row], builder.mul(at, i64(self._step))))
                    s, u, t = (
                        kernel.splat(kernel.load(kernel.at(place, 4 * i), F32, 4), lanes)
                        for place in (kernel.at(factors[row], builder.mul(at, i64(FACTOR_BYTES))),)
                        for i in range(3)
                    )
                    value = kernel.fma(s, builder.sitofp(dots, floats), u)
                    total = kernel.fma(scale, value, builder.load(sums[row], typ=floats))
                    builder.store(kernel.fma(zero, t, total), sums[row])
        for row, total in zip(rows, sums, strict=True):
            kernel.store(
                builder.load(total, typ=floats), kernel.at(y, builder.mul(row, self._fields["y_row_bytes"])), 4
            )

    @property
    def _step(self) -> int:
        return activation_bytes(self._precision)

    def _unpacked(self, packed: Value) -> list[Value]:
        """The block's weights as 8 vectors of bytes: in each, 4 columns of every lane."""
        kernel, builder, width = self._kernel, self._kernel.builder, 4 * self._lanes
        num_loads = self._bits
        raw = [kernel.load(kernel.at(packed, width * i), vector(I8, width)) for i in range(num_loads)]
        if self._bits == 8:
            return raw
        return [
            *(builder.and_(byte, filled(I8, width, 15)) for byte in raw),
            *(builder.lshr(byte, filled(I8, width, 4)) for byte in raw),
        ]

    def _dots(self, q: list[Value], activations: Value) -> Value:
        """Σ q · i over the block, int32 [lanes]."""
        high = self._byte_dots(q, activations)
        if self._precision == 8:
            return high
        low = self._byte_dots(q, self._kernel.at(activations, BLOCK))
        builder = self._kernel.builder
        return builder.add(builder.shl(high, filled(I32, self._lanes, 8)), low)

    def _byte_dots(self, q: list[Value], activations: Value) -> Value:
        kernel, lanes = self._kernel, self._lanes
        sums = ir.Constant(vector(I32, lanes), None)
        for i, weights in enumerate(q):
            four = kernel.splat(kernel.load(kernel.at(activations, 4 * i), I32), lanes)
            sums = self._target.dot(kernel, lanes, sums, weights, kernel.builder.bitcast(four, vector(I8, 4 * lanes)))
        return sums


MANY_ROWS = 16
"""From here on rows are quantized by all threads; a few are done before a barrier would be over."""


class MatrixKernel:
    def __init__(self, compiled: CompiledModule, name: str) -> None:
        self._compiled, self._name = compiled, name
        self._alone, self._quantize = compiled.run(name), compiled.run(f"{name}_quantize")
        self._team, self._multiply = compiled.team_run(f"{name}_team"), compiled.team_run(f"{name}_multiply_team")

    def __call__(self, fields: int, rows: int, threads: int) -> None:
        """Run it over the fields at an address, which say `rows` too."""
        if threads == 1 or self._team is None or self._multiply is None:
            self._alone(fields)
        elif rows < MANY_ROWS:
            self._quantize(fields)
            self._multiply(fields, threads)
        else:
            self._team(fields, threads)

    @property
    def address(self) -> int:
        """Of the function for one thread."""
        return self._compiled.address(self._name)

    def add_to(self, program: Program, fields: tuple[KernelFields, int], rows: int, threads: int) -> None:
        """Put a call for up to so many rows into a program."""
        program.keep(self._compiled)
        if threads == 1 or not self._compiled.has_teams:
            program.call(self.address, fields)
            return
        if rows >= MANY_ROWS:
            program.call(self._compiled.address(f"{self._name}_team"), fields, threads)
            return
        program.call(self._compiled.address(f"{self._name}_quantize"), fields)
        program.call(self._compiled.address(f"{self._name}_multiply_team"), fields, threads)


class MatrixKernels:
    """Those of one instruction set. Each takes half a second to compile."""

    def __init__(self, target: InstructionSet) -> None:
        self.target = target
        self._kernels: dict[tuple[int, Precision], MatrixKernel] = {}

    @property
    def compiled(self) -> Collection[MatrixKernel]:
        """What has been needed so far."""
        return self._kernels.values()

    def kernel(self, bits: int, precision: Precision) -> MatrixKernel:
        """For weights of `bits` and activations of `precision` bits."""
        found = self._kernels.get((bits, precision))
        if found is None:
            compiled = CompiledModule(matrix_module(self.target, bits, precision))
            found = self._kernels[bits, precision] = MatrixKernel(compiled, kernel_name(bits, precision))
        return found


@cache
def matrix_kernels() -> MatrixKernels:
    """Those of this machine."""
    return MatrixKernels(host_instruction_sets()[0])


def matrix_module(target: InstructionSet, bits: int, precision: Precision) -> ir.Module:
    module = ir.Module("projection")
    write_linear(module, bits, precision, target)
    return module
