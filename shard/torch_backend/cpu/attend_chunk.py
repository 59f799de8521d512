"""The kernel of prompts' attention: runs of tokens, each over its sequence's KV, causal, within a window.

First all tokens' keys and values are put in their places. Then a task is one KV head and a block of a run's tokens with
the query heads that share it, and goes through the positions 256 at a time: keys transposed, so that a vector has a
word of 16 positions; scores of a few query rows, kept in registers; their softmax so far (Milakov and Gimelshein 2018);
sums of values. Positions are taken in the same pieces for every row, wherever its block begins: a token's result does
not depend on its chunk.
"""

from __future__ import annotations

from llvmlite import ir

from shard.torch_backend.cpu.attend_tile import GROUP, PIECE, SPAN, VECTOR_BYTES, Layout, Tiles, groups_in
from shard.torch_backend.cpu.builder import F32, I32, I64, PTR, VOID, Kernel, Value, f32, filled, i64, vector
from shard.torch_backend.cpu.heads import AttendShape, scale_of, store_kv, turned, vectors_at
from shard.torch_backend.cpu.mathematics import LOG2_E, WIDTH, sum_of, transposed
from shard.torch_backend.cpu.products import Products
from shard.torch_backend.cpu.rowwise import read_fields

FIELDS = (
    "qkv", "out", "scratch", "runs", "cos", "sin", "q_norm", "k_norm",
    "qkv_row_bytes", "num_runs", "tasks", "block_tokens", "window", "scratch_thread_bytes",
)  # fmt: skip
"""`cos` and `sin`: of row 0, [rotary / 2] float32 a row. `window` 0: all before."""
RUN_FIELDS = ("row", "rows", "keys", "values", "head_bytes", "first", "start")
"""Of a run: rows [row, row + rows) of `qkv` are tokens from position `start`; its keys and values of KV head 0 are held
from position `first` on at these addresses, and those of the next head `head_bytes` further."""

_FLOATS = vector(F32, WIDTH)
_NOTHING = -1e30
"""The largest score where none was seen: less than any, and no infinity, of which there would be no difference."""


def scratch_bytes(shape: AttendShape, products: Products, block_tokens: int) -> int:
    """Of each thread, for one task."""
    layout = Layout(shape, products)
    return layout.rows_at + shape.queries * block_tokens * layout.row_bytes


def write_attend_chunk(module: ir.Module, shape: AttendShape, products: Products, tile_rows: int) -> str:
    """Functions `attend_chunk(fields)` and `attend_chunk_team(fields)`. `tile_rows`, 8 or 4: query rows that share a
    load of keys."""
    place = _write_place(module, shape)
    task = _Task(module, shape, products, tile_rows).write()
    alone = Kernel(module, "attend_chunk", [("fields", PTR)])
    fields = read_fields(alone, FIELDS, ())
    alone.builder.call(place, [alone["fields"], i64(0), i64(1)])
    with alone.loop(i64(0), fields["tasks"]) as index:
        alone.builder.call(task, [alone["fields"], index, i64(0)])
    alone.finish()
    team = Kernel(module, "attend_chunk_team", [("fields", PTR)])
    fields = read_fields(team, FIELDS, ())
    first = team.builder.sext(team.call("omp_get_thread_num", I32, []), I64)
    step = team.builder.sext(team.call("omp_get_num_threads", I32, []), I64)
    team.builder.call(place, [team["fields"], first, step])
    team.call("GOMP_barrier", VOID, [])
    with team.loop(first, fields["tasks"], step) as index:
        team.builder.call(task, [team["fields"], index, first])
    team.finish()
    return "attend_chunk"


def _read_run(kernel: Kernel, run: Value) -> dict[str, Value]:
    fields = {name: kernel.load(kernel.at(run, 8 * i), I64, 8) for i, name in enumerate(RUN_FIELDS)}
    for name in ("keys", "values"):
        fields[name] = kernel.builder.inttoptr(fields[name], PTR)
    return fields


def _angles(kernel: Kernel, shape: AttendShape, fields: dict[str, Value], row: Value) -> list[Value]:
    at = kernel.builder.mul(row, i64(2 * shape.rotary))
    return [kernel.at(fields[name], at) for name in ("cos", "sin")]


def _write_place(module: ir.Module, shape: AttendShape) -> Value:
    """(fields, first, step): keys, normed and turned, and values of each run's rows first, first + step, … → KV."""
    kernel = Kernel(module, "attend_chunk_place", [("fields", PTR), ("first", I64), ("step", I64)])
    builder = kernel.builder
    fields = read_fields(kernel, FIELDS, ("qkv", "runs", "cos", "sin", "k_norm"))
    with kernel.loop(i64(0), fields["num_runs"]) as index:
        run = _read_run(kernel, kernel.at(fields["runs"], builder.mul(index, i64(8 * len(RUN_FIELDS)))))
        held = builder.sub(run["start"], run["first"])
        with kernel.loop(kernel["first"], run["rows"], kernel["step"]) as number:
            row = builder.add(run["row"], number)
            cos, sin = _angles(kernel, shape, fields, row)
            at = builder.add(builder.mul(row, fields["qkv_row_bytes"]), i64(shape.heads * shape.head_bytes))
            place = builder.mul(builder.add(held, number), i64(shape.kv_row_bytes))
            with kernel.loop(i64(0), i64(shape.kv_heads)) as head:
                key = kernel.at(fields["qkv"], builder.add(at, builder.mul(head, i64(shape.head_bytes))))
                value = kernel.at(key, shape.kv_heads * shape.head_bytes)
                mine = builder.add(place, builder.mul(head, run["head_bytes"]))
                parts = turned(kernel, shape, vectors_at(kernel, shape, key), fields["k_norm"], cos, sin)
                store_kv(kernel, shape, parts, kernel.at(run["keys"], mine))
                store_kv(kernel, shape, vectors_at(kernel, shape, value), kernel.at(run["values"], mine))
    kernel.finish()
    return kernel.function


class _Task:
    """Writes the function of one task: (fields, index, thread), index = block · kv_heads + KV head, blocks counted over
    all runs."""

    def __init__(self, module: ir.Module, shape: AttendShape, products: Products, tile_rows: int) -> None:
        self._shape = shape
        self._products = products
        self._tile_rows = tile_rows
        self._layout = Layout(shape, products)
        self._kernel = Kernel(module, "attend_chunk_task", [("fields", PTR), ("index", I64), ("thread", I64)])

    def write(self) -> Value:
        kernel, shape, layout = self._kernel, self._shape, self._layout
        builder = kernel.builder
        fields = read_fields(kernel, FIELDS, ("qkv", "out", "scratch", "runs", "cos", "sin", "q_norm"))
        block, head = (op(kernel["index"], i64(shape.kv_heads)) for op in (builder.sdiv, builder.srem))
        run, block = self._found(fields, block)
        window = builder.select(builder.icmp_signed(">", fields["window"], i64(0)), fields["window"], i64(1 << 30))
        first_row = builder.mul(block, fields["block_tokens"])
        tokens = kernel.minimum(fields["block_tokens"], builder.sub(run["rows"], first_row))
        rows = builder.mul(tokens, i64(shape.queries))
        own = builder.add(run["start"], first_row)
        self._first, self._last = run["first"], builder.sub(builder.add(own, tokens), i64(1))
        oldest = kernel.maximum(i64(0), builder.sub(own, builder.sub(window, i64(1))))
        skipped = builder.mul(head, run["head_bytes"])
        keys, values = (kernel.at(run[name], skipped) for name in ("keys", "values"))

        self._scratch = kernel.at(fields["scratch"], builder.mul(kernel["thread"], fields["scratch_thread_bytes"]))
        self._tiles = Tiles(kernel, shape, self._products, self._scratch, own, window)
        packed_row = builder.add(run["row"], first_row)
        first_head = builder.mul(head, i64(shape.queries * shape.head_bytes))
        self._prepare(fields, packed_row, tokens, first_head)

        end = builder.add(self._last, i64(1))
        with kernel.loop(builder.and_(oldest, i64(-PIECE)), end, i64(PIECE)) as piece:
            begin = kernel.maximum(piece, builder.and_(oldest, i64(-GROUP)))
            piece_end = kernel.minimum(builder.add(piece, i64(PIECE)), end)
            groups = groups_in(kernel, begin, piece_end)
            self._lay_out(keys, values, begin, groups)
            done = kernel.variable(I64)
            builder.store(i64(0), done)
            count = self._tile_rows
            while count:
                with kernel.loop(builder.load(done, typ=I64), builder.sub(rows, i64(count - 1)), i64(count)) as first:
                    self._tiles.add(first, count, begin, piece_end)
                    builder.store(builder.add(first, i64(count)), done)
                count //= 2

        at = builder.add(builder.mul(packed_row, i64(shape.heads * shape.head_bytes)), first_head)
        out = kernel.at(fields["out"], at)
        with kernel.loop(i64(0), rows) as row:
            mine = self._tiles.row(row)
            total = sum_of(kernel, kernel.load(kernel.at(mine, layout.sum_at), _FLOATS, 4))
            inverse = kernel.splat(builder.fdiv(f32(1.0), total), WIDTH)
            token, query = builder.sdiv(row, i64(shape.queries)), builder.srem(row, i64(shape.queries))
            at = builder.mul(token, i64(shape.heads * shape.head_bytes))
            target = kernel.at(out, builder.add(at, builder.mul(query, i64(shape.head_bytes))))
            for part in range(0, shape.head_bytes, VECTOR_BYTES):
                sums = kernel.load(kernel.at(mine, layout.sums_of_values_at + part), _FLOATS, 4)
                kernel.store(builder.fmul(sums, inverse), kernel.at(target, part), 4)
        kernel.finish()
        return kernel.function

    def _found(self, fields: dict[str, Value], block: Value) -> tuple[dict[str, Value], Value]:
        """The run that has the block, and which of its own it is."""
        kernel, builder = self._kernel, self._kernel.builder
        left, mine, place = kernel.variable(I64), kernel.variable(I64), kernel.variable(PTR)
        builder.store(block, left)
        builder.store(block, mine)
        builder.store(fields["runs"], place)
        size = fields["block_tokens"]
        with kernel.loop(i64(0), fields["num_runs"]) as index:
            run = kernel.at(fields["runs"], builder.mul(index, i64(8 * len(RUN_FIELDS))))
            rows = kernel.load(kernel.at(run, 8 * RUN_FIELDS.index("rows")), I64, 8)
            blocks = builder.sdiv(builder.add(rows, builder.sub(size, i64(1))), size)
            before = builder.load(left, typ=I64)
            with kernel.only_if(builder.icmp_unsigned("<", before, blocks)):  # as a negative number is not
                builder.store(before, mine)
                builder.store(run, place)
            builder.store(builder.sub(before, blocks), left)
        return _read_run(kernel, builder.load(place, typ=PTR)), builder.load(mine, typ=I64)

    def _prepare(self, fields: dict[str, Value], packed_row: Value, tokens: Value, first_head: Value) -> None:
        """Each row's query, normed, turned and scaled; nothing summed up yet."""
        kernel, shape, layout, products = self._kernel, self._shape, self._layout, self._products
        builder = kernel.builder
        # Scores are exponents of 2, but where they are capped before.
        scale = shape.scale * (LOG2_E if shape.softcap is None else 1.0)
        with kernel.loop(i64(0), tokens) as token:
            packed = builder.add(packed_row, token)
            cos, sin = _angles(kernel, shape, fields, packed)
            source = kernel.at(fields["qkv"], builder.add(builder.mul(packed, fields["qkv_row_bytes"]), first_head))
            with kernel.loop(i64(0), i64(shape.queries)) as query:
                mine = self._tiles.row(builder.add(builder.mul(token, i64(shape.queries)), query))
                parts = vectors_at(kernel, shape, kernel.at(source, builder.mul(query, i64(shape.head_bytes))))
                step = 4 * shape.width // products.per_word
                for i, part in enumerate(turned(kernel, shape, parts, fields["q_norm"], cos, sin)):
                    scaled = builder.fmul(part, filled(F32, shape.width, scale))
                    products.store(kernel, scaled, kernel.at(mine, step * i))
                for at in range(layout.sums_of_values_at, layout.largest_at, VECTOR_BYTES):
                    kernel.store(ir.Constant(_FLOATS, None), kernel.at(mine, at), 4)
                kernel.store(f32(_NOTHING), kernel.at(mine, layout.largest_at), 4)

    def _held(self, rows: Value, position: Value) -> Value:
        """A position's key or value: the nearest one held where there is none, which no weight lets through."""
        kernel, builder = self._kernel, self._kernel.builder
        nearest = kernel.minimum(kernel.maximum(position, self._first), self._last)
        return kernel.at(rows, builder.mul(builder.sub(nearest, self._first), i64(self._shape.kv_row_bytes)))

    def _lay_out(self, keys: Value, values: Value, begin: Value, groups: Value) -> None:
        """Keys of each group of positions as columns [words, 32]; values as [positions / per_word, head_dim] words."""
        kernel, shape, layout, products = self._kernel, self._shape, self._layout, self._products
        builder = kernel.builder
        parts = layout.query_bytes // VECTOR_BYTES
        with kernel.loop(i64(0), builder.mul(groups, i64(SPAN))) as number:
            position = builder.add(begin, builder.mul(number, i64(WIDTH)))
            rows = [self._held(keys, builder.add(position, i64(lane))) for lane in range(WIDTH)]
            self._fetch_ahead(rows)
            group, half = builder.sdiv(number, i64(SPAN)), builder.srem(number, i64(SPAN))
            at = builder.mul(group, i64(GROUP * layout.query_bytes))
            target = kernel.at(self._scratch, builder.add(at, builder.mul(half, i64(VECTOR_BYTES))))
            with kernel.loop(i64(0), i64(parts)) as part:
                loaded = [products.key_words(kernel, shape, row, part) for row in rows]
                place = kernel.at(target, builder.mul(part, i64(WIDTH * SPAN * VECTOR_BYTES)))
                for i, column in enumerate(transposed(kernel, loaded)):
                    kernel.store(column, kernel.at(place, SPAN * VECTOR_BYTES * i), 4)
            if shape.has_scales:
                self._lay_out_scales(rows, number, WIDTH, layout.key_scales_at)
        laid = kernel.at(self._scratch, layout.values_at)
        per_word = products.per_word
        with kernel.loop(i64(0), builder.mul(groups, i64(GROUP // per_word))) as number:
            position = builder.add(begin, builder.mul(number, i64(per_word)))
            rows = [self._held(values, builder.add(position, i64(i))) for i in range(per_word)]
            self._fetch_ahead(rows)
            target = kernel.at(laid, builder.mul(number, i64(shape.head_bytes)))
            for part in range(parts):
                for i, words in enumerate(products.value_words(kernel, shape, rows, part)):
                    kernel.store(words, kernel.at(target, VECTOR_BYTES * (per_word * part + i)), 4)
            if shape.has_scales:
                self._lay_out_scales(rows, number, per_word, layout.value_scales_at)

    def _lay_out_scales(self, rows: list[Value], number: Value, count: int, at: int) -> None:
        """Of `count` positions at a time, one after another."""
        kernel = self._kernel
        place = kernel.at(self._scratch, kernel.builder.add(kernel.builder.mul(number, i64(4 * count)), i64(at)))
        for i, row in enumerate(rows):
            kernel.store(scale_of(kernel, self._shape, row), kernel.at(place, 4 * i), 4)

    def _fetch_ahead(self, rows: list[Value]) -> None:
        """Ask for the next piece's keys or values, which come while this one is computed with."""
        kernel, row_bytes = self._kernel, self._shape.kv_row_bytes
        for row in rows:
            for at in range(0, row_bytes, 64):
                ahead = kernel.at(row, PIECE * row_bytes + at)
                kernel.call("llvm.prefetch.p0", VOID, [ahead, *(ir.Constant(I32, i) for i in (0, 2, 1))])
