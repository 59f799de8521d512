"""The kernel of a prompt chunk's attention: a run of tokens over its sequence's KV, causal, within a window.

One task is one KV head and a block of tokens with the query heads that share it. Scores of 16 positions at a time are
sums over features of products with transposed keys, so that every lane works; then a softmax over whole rows; then
sums of values. All in float32, whatever the KV is held in; a token's result does not depend on its chunk.
"""

from __future__ import annotations

from llvmlite import ir

from shard.torch_backend.cpu.attend import AttendShape
from shard.torch_backend.cpu.builder import F32, I32, I64, PTR, Kernel, Value, f32, filled, i64, vector
from shard.torch_backend.cpu.mathematics import (
    WIDTH,
    exp,
    float_bytes,
    largest_of,
    load_floats,
    softcapped,
    sum_of,
    transposed,
)
from shard.torch_backend.cpu.rowwise import read_fields

FIELDS = (
    "queries", "out", "keys", "values", "scratch",
    "query_row_bytes", "head_bytes", "rows", "start", "window", "tasks", "scratch_thread_bytes",
)  # fmt: skip
"""`start`: the position of the first row, counted from the first key. `window` 0: all before."""

_FLOATS = vector(F32, WIDTH)
_TOGETHER = 8
"""Query rows that share a load of keys."""
_VALUE_ROWS = 4
_LEAST_ROWS = 24


def block_tokens(shape: AttendShape) -> int:
    """Tokens of a task: their query rows are a multiple of 8, and enough to pay for transposing the keys."""
    tokens = 1
    while shape.queries * tokens < _LEAST_ROWS or shape.queries * tokens % _TOGETHER:
        tokens *= 2
    return tokens


def is_supported(shape: AttendShape) -> bool:
    return shape.is_supported() and shape.head_dim % WIDTH == 0


def scratch_bytes(shape: AttendShape, positions: int) -> int:
    """Of each thread, for one task: its queries, scaled; 16 keys, transposed; scores, padded to whole vectors."""
    rows = shape.queries * block_tokens(shape)
    return 4 * (rows * shape.head_dim + WIDTH * shape.head_dim + rows * _padded(positions))


def _padded(positions: int) -> int:
    return -(-positions // WIDTH) * WIDTH


def write_attend_chunk(module: ir.Module, shape: AttendShape) -> str:
    """Functions `attend_chunk(fields)` and `attend_chunk_team(fields)`."""
    task = _Task(module, shape).write()
    alone = Kernel(module, "attend_chunk", [("fields", PTR)])
    fields = read_fields(alone, FIELDS, ())
    with alone.loop(i64(0), fields["tasks"]) as index:
        alone.builder.call(task, [alone["fields"], index, i64(0)])
    alone.finish()
    team = Kernel(module, "attend_chunk_team", [("fields", PTR)])
    fields = read_fields(team, FIELDS, ())
    first = team.builder.sext(team.call("omp_get_thread_num", I32, []), I64)
    step = team.builder.sext(team.call("omp_get_num_threads", I32, []), I64)
    with team.loop(first, fields["tasks"], step) as index:
        team.builder.call(task, [team["fields"], index, first])
    team.finish()
    return "attend_chunk"


class _Task:
    """Writes the function of one task: (fields, index, thread), index = block · kv_heads + KV head."""

    def __init__(self, module: ir.Module, shape: AttendShape) -> None:
        self._shape = shape
        self._tokens = block_tokens(shape)
        self._rows = shape.queries * self._tokens
        self._row_bytes = 4 * shape.head_dim
        self._kv_row_bytes = shape.head_dim * float_bytes(shape.kv_dtype)
        self._kernel = Kernel(module, "attend_chunk_task", [("fields", PTR), ("index", I64), ("thread", I64)])

    def write(self) -> Value:
        kernel, shape = self._kernel, self._shape
        builder = kernel.builder
        fields = read_fields(kernel, FIELDS, ("queries", "out", "keys", "values", "scratch"))
        block, head = (op(kernel["index"], i64(shape.kv_heads)) for op in (builder.sdiv, builder.srem))
        first_row = builder.mul(block, i64(self._tokens))
        last_row = builder.sub(fields["rows"], i64(1))
        end = kernel.minimum(builder.add(first_row, i64(self._tokens)), fields["rows"])
        # Positions [begin, end) are seen by some token of the block; begin is a multiple of 16.
        end = builder.add(fields["start"], end)
        own, last = builder.add(fields["start"], first_row), builder.sub(end, i64(1))
        oldest = builder.add(builder.sub(own, fields["window"]), i64(1))
        has_window = builder.icmp_signed(">", fields["window"], i64(0))
        is_inside = builder.and_(has_window, builder.icmp_signed(">", oldest, i64(0)))
        begin = builder.and_(builder.select(is_inside, oldest, i64(0)), i64(-WIDTH))
        window = builder.select(has_window, fields["window"], i64(1 << 40))

        skipped = builder.mul(head, fields["head_bytes"])
        keys, values = (kernel.at(fields[name], skipped) for name in ("keys", "values"))
        queries = kernel.at(fields["scratch"], builder.mul(kernel["thread"], fields["scratch_thread_bytes"]))
        columns = kernel.at(queries, self._rows * self._row_bytes)
        scores = kernel.at(columns, WIDTH * self._row_bytes)
        padded = builder.and_(builder.add(builder.sub(end, begin), i64(WIDTH - 1)), i64(-WIDTH))
        score_row = builder.mul(padded, i64(4))

        first_head = builder.mul(head, i64(shape.queries * self._row_bytes))
        with kernel.loop(i64(0), i64(self._tokens)) as token:
            row = kernel.minimum(builder.add(first_row, token), last_row)
            source = kernel.at(fields["queries"], builder.add(builder.mul(row, fields["query_row_bytes"]), first_head))
            target = kernel.at(queries, builder.mul(token, i64(shape.queries * self._row_bytes)))
            with kernel.loop(i64(0), i64(shape.queries * self._row_bytes), i64(4 * WIDTH)) as at:
                scaled = builder.fmul(kernel.load(kernel.at(source, at), _FLOATS, 4), filled(F32, WIDTH, shape.scale))
                kernel.store(scaled, kernel.at(target, at), 4)

        with kernel.loop(begin, end, i64(WIDTH)) as position:
            self._transpose(keys, position, last, columns)
            place = kernel.at(scores, builder.mul(builder.sub(position, begin), i64(4)))
            with kernel.loop(i64(0), i64(self._rows), i64(_TOGETHER)) as row:
                self._score(queries, columns, row, position, own, last, window, place, score_row)

        out_row = shape.heads * self._row_bytes
        with kernel.loop(i64(0), i64(self._rows), i64(_VALUE_ROWS)) as row:
            rows = [builder.add(row, i64(i)) for i in range(_VALUE_ROWS)]
            places = [kernel.at(scores, builder.mul(one, score_row)) for one in rows]
            inverses = [self._soften(place, score_row) for place in places]
            outs = []
            for one in rows:
                token, query = builder.sdiv(one, i64(shape.queries)), builder.srem(one, i64(shape.queries))
                at = builder.mul(kernel.minimum(builder.add(first_row, token), last_row), i64(out_row))
                at = builder.add(at, builder.add(first_head, builder.mul(query, i64(self._row_bytes))))
                outs.append(kernel.at(fields["out"], at))
            self._gather(places, inverses, values, begin, end, outs)
        kernel.finish()
        return kernel.function

    def _transpose(self, keys: Value, position: Value, last: Value, columns: Value) -> None:
        """Keys at 16 positions, those past `last` again that one, → columns [head_dim, 16]."""
        kernel, shape = self._kernel, self._shape
        builder = kernel.builder
        rows = []
        for lane in range(WIDTH):
            at = kernel.minimum(builder.add(position, i64(lane)), last)
            rows.append(kernel.at(keys, builder.mul(at, i64(self._kv_row_bytes))))
        step = WIDTH * float_bytes(shape.kv_dtype)
        with kernel.loop(i64(0), i64(shape.head_dim // WIDTH)) as part:
            loaded = [
                load_floats(kernel, kernel.at(row, builder.mul(part, i64(step))), shape.kv_dtype, WIDTH) for row in rows
            ]
            target = kernel.at(columns, builder.mul(part, i64(4 * WIDTH * WIDTH)))
            for i, column in enumerate(transposed(kernel, loaded)):
                kernel.store(column, kernel.at(target, 4 * WIDTH * i), 4)

    def _score(
        self,
        queries: Value,
        columns: Value,
        first: Value,
        position: Value,
        own: Value,
        last: Value,
        window: Value,
        place: Value,
        score_row: Value,
    ) -> None:
        """Scores of 8 query rows at 16 positions; −∞ where a token may not look."""
        kernel, shape = self._kernel, self._shape
        builder = kernel.builder
        rows = [builder.add(first, i64(i)) for i in range(_TOGETHER)]
        addresses = [kernel.at(queries, builder.mul(row, i64(self._row_bytes))) for row in rows]
        sums = [kernel.variable(_FLOATS) for _ in rows]
        for total in sums:
            builder.store(ir.Constant(_FLOATS, None), total)
        with kernel.loop(i64(0), i64(shape.head_dim)) as feature:
            column = kernel.load(kernel.at(columns, builder.mul(feature, i64(4 * WIDTH))), _FLOATS, 4)
            at = builder.mul(feature, i64(4))
            for address, total in zip(addresses, sums, strict=True):
                query = kernel.splat(kernel.load(kernel.at(address, at), F32, 4), WIDTH)
                builder.store(kernel.fma(query, column, builder.load(total, typ=_FLOATS)), total)
        longs = vector(I64, WIDTH)
        lanes = ir.Constant(longs, list(range(WIDTH)))
        positions = builder.add(kernel.splat(position, WIDTH), lanes)
        lowest = filled(F32, WIDTH, float("-inf"))
        for row, total in zip(rows, sums, strict=True):
            # Rows past the run are its last token's again, so that they write the same.
            token = kernel.minimum(builder.add(own, builder.sdiv(row, i64(shape.queries))), last)
            behind = builder.sub(kernel.splat(token, WIDTH), positions)
            # 0 ≤ behind < window, as one unsigned comparison.
            visible = builder.icmp_unsigned("<", behind, kernel.splat(window, WIDTH))
            score = builder.load(total, typ=_FLOATS)
            if shape.softcap is not None:
                score = softcapped(kernel, score, shape.softcap)
            score = builder.select(visible, score, lowest)
            kernel.store(score, kernel.at(place, builder.mul(row, score_row)), 4)

    def _soften(self, scores: Value, score_row: Value) -> Value:
        """exp(score − largest) in place, 0 where a token may not look; the inverse of their sum."""
        kernel, builder = self._kernel, self._kernel.builder
        largest, total = kernel.variable(_FLOATS), kernel.variable(_FLOATS)
        lowest = filled(F32, WIDTH, float("-inf"))
        builder.store(lowest, largest)
        builder.store(ir.Constant(_FLOATS, None), total)
        with kernel.loop(i64(0), score_row, i64(4 * WIDTH)) as at:
            score, before = kernel.load(kernel.at(scores, at), _FLOATS, 4), builder.load(largest, typ=_FLOATS)
            builder.store(builder.select(builder.fcmp_ordered(">", score, before), score, before), largest)
        maxima = kernel.splat(largest_of(kernel, builder.load(largest, typ=_FLOATS)), WIDTH)
        with kernel.loop(i64(0), score_row, i64(4 * WIDTH)) as at:
            place = kernel.at(scores, at)
            score = kernel.load(place, _FLOATS, 4)
            weight = builder.select(
                builder.fcmp_unordered(">", score, lowest),
                exp(kernel, builder.fsub(score, maxima)),
                ir.Constant(_FLOATS, None),
            )
            kernel.store(weight, place, 4)
            builder.store(builder.fadd(builder.load(total, typ=_FLOATS), weight), total)
        return builder.fdiv(f32(1.0), sum_of(kernel, builder.load(total, typ=_FLOATS)))

    def _gather(
        self, places: list[Value], inverses: list[Value], values: Value, begin: Value, end: Value, outs: list[Value]
    ) -> None:
        """out = Σ weight · value · inverse for a few query rows, four vectors of features at a time."""
        kernel, shape = self._kernel, self._shape
        builder = kernel.builder
        parts = shape.head_dim // WIDTH
        for first in range(0, parts, 4):
            some = range(first, min(parts, first + 4))
            totals = [[kernel.variable(_FLOATS) for _ in some] for _ in places]
            for total in (total for row in totals for total in row):
                builder.store(ir.Constant(_FLOATS, None), total)
            with kernel.loop(begin, end) as position:
                row = kernel.at(values, builder.mul(position, i64(self._kv_row_bytes)))
                step = WIDTH * float_bytes(shape.kv_dtype)
                value = [load_floats(kernel, kernel.at(row, step * part), shape.kv_dtype, WIDTH) for part in some]
                at = builder.mul(builder.sub(position, begin), i64(4))
                for place, sums in zip(places, totals, strict=True):
                    weight = kernel.splat(kernel.load(kernel.at(place, at), F32, 4), WIDTH)
                    for v, total in zip(value, sums, strict=True):
                        builder.store(kernel.fma(weight, v, builder.load(total, typ=_FLOATS)), total)
            for out, inverse, sums in zip(outs, inverses, totals, strict=True):
                for part, total in zip(some, sums, strict=True):
                    scaled = builder.fmul(builder.load(total, typ=_FLOATS), kernel.splat(inverse, WIDTH))
                    kernel.store(scaled, kernel.at(out, 4 * WIDTH * part), 4)
