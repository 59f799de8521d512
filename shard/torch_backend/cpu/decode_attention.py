"""A decode token's attention on the CPU: first its kernel, then what calls it.

The kernel does the norms and rotary embedding of its heads, puts them into the KV, and attends over what it sees.
One task is one sequence and one KV head with the query heads that share it. Written for one shape of model each:
everything but the number of positions is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from llvmlite import ir

from shard.torch_backend.cpu.compile import CompiledModule, KernelFields, new_fields
from shard.torch_backend.cpu.heads import AttentionShape, apply_rope, scale_of, store_kv, vectors_at
from shard.torch_backend.cpu.ir_builder import (
    F32,
    I64,
    PTR,
    Kernel,
    Value,
    f32,
    filled,
    i64,
    read_fields,
    vector,
    write_task_loops,
)
from shard.torch_backend.cpu.program import Program, Scratch
from shard.torch_backend.cpu.vector_math import WIDTH, exp, float_bytes, load_floats, softcapped, sum_of

FIELDS = (
    "qkv", "out", "scratch", "table", "q_norm", "k_norm",
    "qkv_row_bytes", "tasks", "scratch_thread_bytes",
)  # fmt: skip
ROW_FIELDS = ("keys", "values", "head_bytes", "positions", "cos", "sin")
"""Of each sequence: addresses of the first visible key and value of KV head 0, bytes from one KV head to the next, how
many positions are visible (the last is the token's own, not yet written), and its rows of the rotary tables."""

_FLOATS = vector(F32, WIDTH)
_REGISTERS = 16
"""Vectors of sums kept at once while values are added up."""


def scratch_bytes(shape: AttentionShape, positions: int) -> int:
    """Of each thread, for one task: scores of each query head, padded to whole vectors."""
    return shape.queries * 4 * (-(-positions // WIDTH) * WIDTH)


def write_decode_attention(module: ir.Module, shape: AttentionShape) -> str:
    """Functions `attend(fields)` and `attend_team(fields)`."""
    write_task_loops(module, "attend", FIELDS, _DecodeTask(module, shape).write())
    return "attend"


class _DecodeTask:
    """Writes the function of one task: (fields, index, thread), index = row · kv_heads + KV head."""

    def __init__(self, module: ir.Module, shape: AttentionShape) -> None:
        self._shape = shape
        self._kernel = Kernel(module, "attend_task", [("fields", PTR), ("index", I64), ("thread", I64)])
        self._width = shape.width
        self._floats = vector(F32, self._width)
        self._vectors = shape.head_dim // self._width

    def write(self) -> Value:
        kernel, shape = self._kernel, self._shape
        builder = kernel.builder
        fields = read_fields(kernel, FIELDS, ("qkv", "out", "scratch", "table", "q_norm", "k_norm"))
        row = builder.sdiv(kernel["index"], i64(shape.kv_heads))
        head = builder.srem(kernel["index"], i64(shape.kv_heads))
        place = {
            name: kernel.load(
                kernel.at(fields["table"], builder.add(builder.mul(row, i64(8 * len(ROW_FIELDS))), i64(8 * i))), I64, 8
            )
            for i, name in enumerate(ROW_FIELDS)
        }
        cos, sin = (builder.inttoptr(place[name], PTR) for name in ("cos", "sin"))
        skipped = builder.mul(head, place["head_bytes"])
        keys, values = (kernel.at(builder.inttoptr(place[name], PTR), skipped) for name in ("keys", "values"))
        positions = place["positions"]
        head_bytes = 4 * shape.head_dim
        qkv = kernel.at(fields["qkv"], builder.mul(row, fields["qkv_row_bytes"]))
        key = kernel.at(qkv, builder.mul(builder.add(head, i64(shape.heads)), i64(head_bytes)))
        value = kernel.at(key, shape.kv_heads * head_bytes)
        first_query = builder.mul(head, i64(shape.queries))
        own = builder.mul(builder.sub(positions, i64(1)), i64(shape.kv_row_bytes))

        key_parts = apply_rope(kernel, shape, vectors_at(kernel, shape, key), fields["k_norm"], cos, sin)
        store_kv(kernel, shape, key_parts, kernel.at(keys, own))
        store_kv(kernel, shape, vectors_at(kernel, shape, value), kernel.at(values, own))
        queries = []
        for query in range(shape.queries):
            at = builder.mul(builder.add(first_query, i64(query)), i64(head_bytes))
            parts = apply_rope(kernel, shape, vectors_at(kernel, shape, kernel.at(qkv, at)), fields["q_norm"], cos, sin)
            queries.append([builder.fmul(part, filled(F32, self._width, shape.scale)) for part in parts])

        padded = builder.and_(builder.add(positions, i64(WIDTH - 1)), i64(-WIDTH))
        scratch = kernel.at(fields["scratch"], builder.mul(kernel["thread"], fields["scratch_thread_bytes"]))
        rows = [kernel.at(scratch, builder.mul(padded, i64(4 * query))) for query in range(shape.queries)]
        maxima = self._score(queries, keys, positions, padded, rows)
        sums = [self._softmax(scores, maximum, padded) for scores, maximum in zip(rows, maxima, strict=True)]
        out = kernel.at(
            fields["out"],
            builder.add(builder.mul(row, i64(shape.heads * head_bytes)), builder.mul(first_query, i64(head_bytes))),
        )
        at_once = max(1, _REGISTERS // self._vectors)
        for first in range(0, shape.queries, at_once):
            span = slice(first, first + at_once)
            self._add_values(rows[span], sums[span], values, positions, kernel.at(out, first * head_bytes))
        kernel.finish()
        return kernel.function

    def _load_kv(self, pointer: Value) -> list[Value]:
        step = self._width * float_bytes(self._shape.kv_dtype)
        kernel, dtype = self._kernel, self._shape.kv_dtype
        return [load_floats(kernel, kernel.at(pointer, step * i), dtype, self._width) for i in range(self._vectors)]

    def _score(
        self, queries: list[list[Value]], keys: Value, positions: Value, padded: Value, rows: list[Value]
    ) -> list[Value]:
        """Scores of each query head at each position, −∞ in the padding; each head's largest."""
        kernel, builder, shape = self._kernel, self._kernel.builder, self._shape
        lowest = filled(F32, WIDTH, float("-inf"))
        last = builder.mul(builder.sub(padded, i64(WIDTH)), i64(4))
        for scores in rows:
            kernel.store(lowest, kernel.at(scores, last), 4)
        maxima = [kernel.variable(F32) for _ in rows]
        for maximum in maxima:
            builder.store(f32(float("-inf")), maximum)
        with kernel.loop(i64(0), positions) as position:
            row = kernel.at(keys, builder.mul(position, i64(shape.kv_row_bytes)))
            key = self._load_kv(row)
            scale = scale_of(kernel, shape, row) if shape.has_scales else None
            at = builder.mul(position, i64(4))
            for query, scores, maximum in zip(queries, rows, maxima, strict=True):
                products = builder.fmul(query[0], key[0])
                for a, b in zip(query[1:], key[1:], strict=True):
                    products = kernel.fma(a, b, products)
                score = sum_of(kernel, products)
                if scale is not None:
                    score = builder.fmul(score, scale)
                kernel.store(score, kernel.at(scores, at), 4)
                before = builder.load(maximum, typ=F32)
                builder.store(builder.select(builder.fcmp_ordered(">", score, before), score, before), maximum)
        return [builder.load(maximum, typ=F32) for maximum in maxima]

    def _softmax(self, scores: Value, maximum: Value, padded: Value) -> Value:
        """exp(score − maximum) in place; their sum."""
        kernel, builder = self._kernel, self._kernel.builder
        total = kernel.variable(_FLOATS)
        builder.store(ir.Constant(_FLOATS, None), total)
        maxima = self._capped(kernel.splat(maximum, WIDTH))
        with kernel.loop(i64(0), builder.mul(padded, i64(4)), i64(4 * WIDTH)) as at:
            place = kernel.at(scores, at)
            weights = exp(kernel, builder.fsub(self._capped(kernel.load(place, _FLOATS, 4)), maxima))
            kernel.store(weights, place, 4)
            builder.store(builder.fadd(builder.load(total, typ=_FLOATS), weights), total)
        return sum_of(kernel, builder.load(total, typ=_FLOATS))

    def _capped(self, scores: Value) -> Value:
        cap = self._shape.softcap
        return scores if cap is None else softcapped(self._kernel, scores, cap)

    def _add_values(self, rows: list[Value], sums: list[Value], values: Value, positions: Value, out: Value) -> None:
        """out = Σ weight · value / Σ weight, for a few query heads."""
        kernel, builder, shape = self._kernel, self._kernel.builder, self._shape
        totals = [[kernel.variable(self._floats) for _ in range(self._vectors)] for _ in rows]
        for total in (total for head in totals for total in head):
            builder.store(ir.Constant(self._floats, None), total)
        with kernel.loop(i64(0), positions) as position:
            row = kernel.at(values, builder.mul(position, i64(shape.kv_row_bytes)))
            value = self._load_kv(row)
            scale = scale_of(kernel, shape, row) if shape.has_scales else None
            at = builder.mul(position, i64(4))
            for scores, head in zip(rows, totals, strict=True):
                one = kernel.load(kernel.at(scores, at), F32, 4)
                weight = kernel.splat(one if scale is None else builder.fmul(one, scale), self._width)
                for part, total in zip(value, head, strict=True):
                    builder.store(kernel.fma(weight, part, builder.load(total, typ=self._floats)), total)
        for number, (head, total_weight) in enumerate(zip(totals, sums, strict=True)):
            inverse = kernel.splat(builder.fdiv(f32(1.0), total_weight), self._width)
            for i, total in enumerate(head):
                place = kernel.at(out, 4 * (self._shape.head_dim * number + self._width * i))
                kernel.store(builder.fmul(builder.load(total, typ=self._floats), inverse), place, 4)


_MIN_TEAM_WORK = 1 << 16
"""Positions times features in a call from which on a team is worth waking."""

_SCRATCH = Scratch()


@cache
def _attend(shape: AttentionShape) -> CompiledModule:
    module = ir.Module("attend")
    write_decode_attention(module, shape)
    return CompiledModule(module)


KVSlot = tuple[int, int, int, int]
"""A token's place in its KV: addresses of the first visible key and value, bytes between heads, positions."""


class DecodeAttention:
    """Attention of decode tokens in one layer. `q_norm` and `k_norm` [head_dim] float32 where the shape has an eps."""

    def __init__(self, shape: AttentionShape, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None) -> None:
        self._shape = shape
        self._norms = (q_norm, k_norm)  # Kept: the kernel knows their addresses.
        compiled = _attend(shape)
        self._alone, self._team = compiled.run("attend"), compiled.team_run("attend_team")
        self._fields, self._address = new_fields(len(FIELDS))
        for position, norm in ((4, q_norm), (5, k_norm)):
            self._fields[position] = 0 if norm is None else norm.data_ptr()

    def __call__(
        self, qkv: torch.Tensor, slots: Sequence[KVSlot], angles: Sequence[tuple[int, int]], threads: int
    ) -> torch.Tensor:
        """qkv [rows, (heads + 2 · kv_heads) · head_dim] float32; for each row its seat and the addresses of its cosines
        and sines, [rotary / 2] float32 each → [rows, heads · head_dim] float32. Writes the rows' keys and values."""
        shape, fields = self._shape, self._fields
        rows = len(slots)
        table, table_address = new_fields(len(ROW_FIELDS) * rows)
        longest = 0
        at = 0
        for slot, angle in zip(slots, angles, strict=True):
            table[at : at + 6] = [*slot, *angle]
            longest = max(longest, slot[3])
            at += 6
        task_bytes = scratch_bytes(shape, longest)
        tasks = rows * shape.kv_heads
        fields[2] = _SCRATCH.reserve(task_bytes * threads)
        out = torch.empty((rows, shape.heads * shape.head_dim), dtype=torch.float32)
        fields[0] = qkv.data_ptr()
        fields[1] = out.data_ptr()
        fields[3] = table_address
        fields[6] = qkv.stride(0) * 4
        fields[7] = tasks
        fields[8] = task_bytes
        is_small = longest * tasks * shape.queries * shape.head_dim < _MIN_TEAM_WORK
        if self._team is None or is_small or threads == 1:
            self._alone(self._address)
        else:
            self._team(self._address, threads)
        return out

    def add_to(self, program: Program, qkv: torch.Tensor, threads: int) -> tuple[torch.Tensor, DecodeKVSlots]:
        """Put the attention of what `qkv` will hold into a program → where it will be, and what to set before each
        run."""
        shape, rows = self._shape, qkv.shape[0]
        out = program.rows("attended", rows, shape.heads * shape.head_dim)
        fields, address = new_fields(len(FIELDS))
        fields[:] = list(self._fields)
        table, table_address = new_fields(len(ROW_FIELDS) * rows)
        fields[0] = qkv.data_ptr()
        fields[1] = out.data_ptr()
        fields[3] = table_address
        fields[6] = qkv.stride(0) * 4
        fields[7] = rows * shape.kv_heads
        compiled = _attend(shape)
        program.keep(self, table, compiled)
        team = threads > 1 and compiled.has_teams
        program.call(compiled.address("attend_team" if team else "attend"), (fields, address), threads if team else 1)
        return out, DecodeKVSlots(shape, fields, table)


class DecodeKVSlots:
    """What changes from step to step in a program's call of attention."""

    def __init__(self, shape: AttentionShape, fields: KernelFields, table: KernelFields) -> None:
        self._shape, self._fields, self._table = shape, fields, table

    def scratch_bytes(self, positions: int) -> int:
        """What each thread works in, if no token sees more than `positions`."""
        return scratch_bytes(self._shape, positions)

    def set(
        self, slots: Sequence[KVSlot], angles: Sequence[tuple[int, int]], scratch: int, scratch_thread_bytes: int
    ) -> None:
        """Seats and angles as for `DecodeAttention`; the address of every thread's scratch."""
        at = 0
        for slot, angle in zip(slots, angles, strict=True):
            self._table[at : at + 6] = [*slot, *angle]
            at += 6
        self._fields[2] = scratch
        self._fields[8] = scratch_thread_bytes
