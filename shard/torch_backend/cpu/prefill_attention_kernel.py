"""The kernel of prompts' attention: runs of tokens, each over its sequence's KV, causal, within a window."""

from __future__ import annotations

from llvmlite import ir

from shard.torch_backend.cpu.heads import AttentionShape, Products, apply_rope, scale_of, store_kv, vectors_at
from shard.torch_backend.cpu.ir_builder import (
    F32,
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
    vector,
    write_task_loops,
)
from shard.torch_backend.cpu.vector_math import LOG2_E, WIDTH, largest_of, power_of_two, softcapped, sum_of, transposed

TILE_POSITIONS = 256
"""Positions whose scores are held at once."""
GROUP_POSITIONS = 32
"""Positions whose scores are kept in registers together."""
VECTOR_BYTES = 4 * WIDTH
GROUP_VECTORS = GROUP_POSITIONS // WIDTH

_FLOAT_VECTOR = vector(F32, WIDTH)
_WORDS = vector(I32, WIDTH)
_VALUE_ROWS = 4
_FEATURES = 4
"""Vectors of features whose sums are kept in registers together, for `_VALUE_ROWS` rows."""


class ScratchLayout:
    """Of a task's scratch: a piece's keys in columns, its values, scores of 8 rows, and by how much their sums so far
    shrink; then for each row its query, sums of values, sum of weights, and largest score."""

    def __init__(self, shape: AttentionShape, products: Products) -> None:
        self.query_bytes = shape.head_bytes // products.per_word
        self.score_bytes = 4 * TILE_POSITIONS
        self.values_at = TILE_POSITIONS * self.query_bytes
        self.scores_at = self.values_at + TILE_POSITIONS // products.per_word * shape.head_bytes
        self.scales_at = self.scores_at + 8 * self.score_bytes
        # Of keys and of values held in 8 bits: a float each.
        self.key_scales_at = self.scales_at + 8 * VECTOR_BYTES
        self.value_scales_at = self.key_scales_at + (4 * TILE_POSITIONS if shape.has_scales else 0)
        self.rows_at = self.value_scales_at + (4 * TILE_POSITIONS if shape.has_scales else 0)
        self.row_bytes = self.query_bytes + shape.head_bytes + 2 * VECTOR_BYTES
        self.sums_of_values_at = self.query_bytes
        self.sum_at = self.sums_of_values_at + shape.head_bytes
        self.largest_at = self.sum_at + VECTOR_BYTES


def groups_in(kernel: Kernel, begin: Value, end: Value) -> Value:
    """How many groups of positions begin in [begin, end)."""
    builder = kernel.builder
    return builder.sdiv(builder.add(builder.sub(end, begin), i64(GROUP_POSITIONS - 1)), i64(GROUP_POSITIONS))


class AttentionTile:
    """Writes them into a task's function. `scratch`: its memory, as in `Layout`; `own`: the position of its row 0's
    token; `window`: how many positions a token sees."""

    def __init__(
        self, kernel: Kernel, shape: AttentionShape, products: Products, scratch: Value, own: Value, window: Value
    ) -> None:
        self._kernel, self._shape, self._products = kernel, shape, products
        self._layout = ScratchLayout(shape, products)
        self._scratch, self._own, self._window = scratch, own, window

    def row(self, row: Value) -> Value:
        """Where a row has its query and results."""
        at = self._kernel.builder.mul(row, i64(self._layout.row_bytes))
        return self._kernel.at(self._scratch, self._kernel.builder.add(at, i64(self._layout.rows_at)))

    def add(self, first: Value, count: int, begin: Value, tile_end: Value) -> None:
        """A piece's part in the results of a few rows."""
        kernel, builder = self._kernel, self._kernel.builder
        queries = i64(self._shape.queries)
        token = builder.add(self._own, builder.sdiv(first, queries))
        last_token = builder.add(self._own, builder.sdiv(builder.add(first, i64(count - 1)), queries))
        end = kernel.minimum(tile_end, builder.add(last_token, i64(1)))
        with kernel.only_if(builder.icmp_signed("<", begin, end)):
            groups = groups_in(kernel, begin, end)
            self._score(first, count, groups)
            behind_first = builder.icmp_signed(
                ">", builder.add(begin, builder.mul(groups, i64(GROUP_POSITIONS))), builder.add(token, i64(1))
            )
            too_old = builder.icmp_signed("<=", begin, builder.sub(last_token, self._window))
            with kernel.only_if(builder.or_(behind_first, too_old)):
                self._mask(first, count, begin, groups)
            with kernel.loop(i64(0), i64(count)) as number:
                self._softmax(self.row(builder.add(first, number)), number, groups)
            for done in range(0, count, _VALUE_ROWS):
                self._add_values(first, range(done, min(count, done + _VALUE_ROWS)), groups)

    def _scores(self, number: Value) -> Value:
        at = self._kernel.builder.mul(number, i64(self._layout.score_bytes))
        return self._kernel.at(self._scratch, self._kernel.builder.add(at, i64(self._layout.scores_at)))

    def _score(self, first: Value, count: int, groups: Value) -> None:
        kernel, shape, layout, products = self._kernel, self._shape, self._layout, self._products
        builder = kernel.builder
        queries = [self.row(builder.add(first, i64(i))) for i in range(count)]
        sums = [[kernel.variable(_FLOAT_VECTOR) for _ in range(GROUP_VECTORS)] for _ in queries]
        with kernel.loop(i64(0), groups) as group:
            columns = kernel.at(self._scratch, builder.mul(group, i64(GROUP_POSITIONS * layout.query_bytes)))
            for total in (total for row in sums for total in row):
                builder.store(ir.Constant(_FLOAT_VECTOR, None), total)
            with kernel.loop(i64(0), i64(layout.query_bytes), i64(4)) as at:
                column = kernel.at(columns, builder.mul(at, i64(GROUP_POSITIONS)))
                words = [kernel.load(kernel.at(column, VECTOR_BYTES * i), _WORDS, 4) for i in range(GROUP_VECTORS)]
                for query, row in zip(queries, sums, strict=True):
                    one = kernel.splat(kernel.load(kernel.at(query, at), I32, 4), WIDTH)
                    for word, total in zip(words, row, strict=True):
                        added = products.multiply_add(kernel, builder.load(total, typ=_FLOAT_VECTOR), one, word)
                        builder.store(added, total)
            for number, row in enumerate(sums):
                place = kernel.at(self._scores(i64(number)), builder.mul(group, i64(4 * GROUP_POSITIONS)))
                for i, total in enumerate(row):
                    score = builder.load(total, typ=_FLOAT_VECTOR)
                    if shape.has_scales:
                        scales = kernel.at(self._scratch, builder.mul(group, i64(4 * GROUP_POSITIONS)))
                        scale = kernel.load(
                            kernel.at(scales, layout.key_scales_at + VECTOR_BYTES * i), _FLOAT_VECTOR, 4
                        )
                        score = builder.fmul(score, scale)
                    if shape.softcap is not None:
                        score = builder.fmul(softcapped(kernel, score, shape.softcap), filled(F32, WIDTH, LOG2_E))
                    kernel.store(score, kernel.at(place, VECTOR_BYTES * i), 4)

    def _mask(self, first: Value, count: int, begin: Value, groups: Value) -> None:
        """−∞ where a row's token may not look."""
        kernel, builder = self._kernel, self._kernel.builder
        lanes = ir.Constant(_WORDS, list(range(WIDTH)))
        window = kernel.splat(builder.trunc(self._window, I32), WIDTH)
        with kernel.loop(i64(0), i64(count)) as number:
            row = builder.sdiv(builder.add(first, number), i64(self._shape.queries))
            token = builder.sub(builder.add(self._own, row), begin)
            scores = self._scores(number)
            with kernel.loop(i64(0), builder.mul(groups, i64(GROUP_POSITIONS)), i64(WIDTH)) as at:
                before = kernel.splat(builder.trunc(builder.sub(token, at), I32), WIDTH)
                # 0 ≤ behind < window, as one unsigned comparison.
                is_visible = builder.icmp_unsigned("<", builder.sub(before, lanes), window)
                place = kernel.at(scores, builder.mul(at, i64(4)))
                score = kernel.load(place, _FLOAT_VECTOR, 4)
                kernel.store(builder.select(is_visible, score, filled(F32, WIDTH, float("-inf"))), place, 4)

    def _softmax(self, row: Value, number: Value, groups: Value) -> None:
        """Scores → weights 2^(score − largest), in their place; the row's largest score and sum of weights."""
        kernel, layout, products = self._kernel, self._layout, self._products
        builder = kernel.builder
        scores = self._scores(number)
        score_bytes = builder.mul(groups, i64(4 * GROUP_POSITIONS))
        largest, total = kernel.variable(_FLOAT_VECTOR), kernel.variable(_FLOAT_VECTOR)
        before = kernel.load(kernel.at(row, layout.largest_at), F32, 4)
        builder.store(kernel.splat(before, WIDTH), largest)
        with kernel.loop(i64(0), score_bytes, i64(VECTOR_BYTES)) as at:
            score, held = kernel.load(kernel.at(scores, at), _FLOAT_VECTOR, 4), builder.load(largest, typ=_FLOAT_VECTOR)
            builder.store(builder.select(builder.fcmp_ordered(">", score, held), score, held), largest)
        found = largest_of(kernel, builder.load(largest, typ=_FLOAT_VECTOR))
        kernel.store(found, kernel.at(row, layout.largest_at), 4)
        maxima = kernel.splat(found, WIDTH)
        shrunk = power_of_two(kernel, builder.fsub(kernel.splat(before, WIDTH), maxima), products.degree)
        at = builder.add(builder.mul(number, i64(VECTOR_BYTES)), i64(layout.scales_at))
        kernel.store(shrunk, kernel.at(self._scratch, at), 4)
        sum_place = kernel.at(row, layout.sum_at)
        builder.store(builder.fmul(kernel.load(sum_place, _FLOAT_VECTOR, 4), shrunk), total)
        with kernel.loop(i64(0), score_bytes, i64(VECTOR_BYTES)) as at:
            score = kernel.load(kernel.at(scores, at), _FLOAT_VECTOR, 4)
            weight = power_of_two(kernel, builder.fsub(score, maxima), products.degree)
            builder.store(builder.fadd(builder.load(total, typ=_FLOAT_VECTOR), weight), total)
            if self._shape.has_scales:
                place = kernel.at(self._scratch, builder.add(at, i64(layout.value_scales_at)))
                weight = builder.fmul(weight, kernel.load(place, _FLOAT_VECTOR, 4))
            products.store(kernel, weight, kernel.at(scores, builder.sdiv(at, i64(products.per_word))))
        kernel.store(builder.load(total, typ=_FLOAT_VECTOR), sum_place, 4)

    def _add_values(self, first: Value, numbers: range, groups: Value) -> None:
        """Sums of values so far, shrunk, and weight · value of the piece, for a few rows."""
        kernel, shape, layout, products = self._kernel, self._shape, self._layout, self._products
        builder = kernel.builder
        rows = [self.row(builder.add(first, i64(number))) for number in numbers]
        weights = [self._scores(i64(number)) for number in numbers]
        scales = [
            kernel.load(kernel.at(self._scratch, layout.scales_at + VECTOR_BYTES * number), _FLOAT_VECTOR, 4)
            for number in numbers
        ]
        word_bytes = builder.mul(groups, i64(4 * GROUP_POSITIONS // products.per_word))
        vectors = shape.head_bytes // VECTOR_BYTES
        for part in range(0, vectors, _FEATURES):
            places = [VECTOR_BYTES * i for i in range(part, min(vectors, part + _FEATURES))]
            sums = [[kernel.variable(_FLOAT_VECTOR) for _ in places] for _ in rows]
            for row, scale, totals in zip(rows, scales, sums, strict=True):
                for place, total in zip(places, totals, strict=True):
                    held = kernel.load(kernel.at(row, layout.sums_of_values_at + place), _FLOAT_VECTOR, 4)
                    builder.store(builder.fmul(held, scale), total)
            with kernel.loop(i64(0), word_bytes, i64(4)) as at:
                value = kernel.at(self._scratch, builder.mul(at, i64(shape.head_dim)))
                words = [kernel.load(kernel.at(value, layout.values_at + place), _WORDS, 4) for place in places]
                for weight, totals in zip(weights, sums, strict=True):
                    one = kernel.splat(kernel.load(kernel.at(weight, at), I32, 4), WIDTH)
                    for word, total in zip(words, totals, strict=True):
                        added = products.multiply_add(kernel, builder.load(total, typ=_FLOAT_VECTOR), one, word)
                        builder.store(added, total)
            for row, totals in zip(rows, sums, strict=True):
                for place, total in zip(places, totals, strict=True):
                    at = kernel.at(row, layout.sums_of_values_at + place)
                    kernel.store(builder.load(total, typ=_FLOAT_VECTOR), at, 4)


FIELDS = (
    "qkv", "out", "scratch", "runs", "cos", "sin", "q_norm", "k_norm",
    "qkv_row_bytes", "num_runs", "tasks", "block_tokens", "window", "scratch_thread_bytes",
)  # fmt: skip
"""`cos` and `sin`: of row 0, [rotary / 2] float32 a row. `window` 0: all before."""
RUN_FIELDS = ("row", "rows", "keys", "values", "head_bytes", "first", "start")
"""Of a run: rows [row, row + rows) of `qkv` are tokens from position `start`; its keys and values of KV head 0 are held
from position `first` on at these addresses, and those of the next head `head_bytes` further."""

_NO_SCORE = -1e30
"""The largest score where none was seen: less than any, and no infinity, of which there would be no difference."""


def scratch_bytes(shape: AttentionShape, products: Products, block_tokens: int) -> int:
    """Of each thread, for one task."""
    layout = ScratchLayout(shape, products)
    return layout.rows_at + shape.queries * block_tokens * layout.row_bytes


def write_prefill_attention(module: ir.Module, shape: AttentionShape, products: Products, tile_rows: int) -> str:
    """Functions `attend_chunk(fields)` and `attend_chunk_team(fields)`. `tile_rows`, 8 or 4: query rows that share a
    load of keys."""
    place = _write_store_kv(module, shape)
    task = _PrefillTask(module, shape, products, tile_rows).write()
    write_task_loops(module, "attend_chunk", FIELDS, task, before=place)
    return "attend_chunk"


def _read_run(kernel: Kernel, run: Value) -> dict[str, Value]:
    fields = {name: kernel.load(kernel.at(run, 8 * i), I64, 8) for i, name in enumerate(RUN_FIELDS)}
    for name in ("keys", "values"):
        fields[name] = kernel.builder.inttoptr(fields[name], PTR)
    return fields


def _angles(kernel: Kernel, shape: AttentionShape, fields: dict[str, Value], row: Value) -> list[Value]:
    at = kernel.builder.mul(row, i64(2 * shape.rotary))
    return [kernel.at(fields[name], at) for name in ("cos", "sin")]


def _write_store_kv(module: ir.Module, shape: AttentionShape) -> Value:
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
                parts = apply_rope(kernel, shape, vectors_at(kernel, shape, key), fields["k_norm"], cos, sin)
                store_kv(kernel, shape, parts, kernel.at(run["keys"], mine))
                store_kv(kernel, shape, vectors_at(kernel, shape, value), kernel.at(run["values"], mine))
    kernel.finish()
    return kernel.function


class _PrefillTask:
    """Writes the function of one task: (fields, index, thread), index = block · kv_heads + KV head, blocks counted over
    all runs."""

    def __init__(self, module: ir.Module, shape: AttentionShape, products: Products, tile_rows: int) -> None:
        self._shape = shape
        self._products = products
        self._tile_rows = tile_rows
        self._layout = ScratchLayout(shape, products)
        self._kernel = Kernel(module, "attend_chunk_task", [("fields", PTR), ("index", I64), ("thread", I64)])

    def write(self) -> Value:
        kernel, shape = self._kernel, self._shape
        builder = kernel.builder
        fields = read_fields(kernel, FIELDS, ("qkv", "out", "scratch", "runs", "cos", "sin", "q_norm"))
        block, head = (op(kernel["index"], i64(shape.kv_heads)) for op in (builder.sdiv, builder.srem))
        run, block = self._find_run(fields, block)
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
        self._tiles = AttentionTile(kernel, shape, self._products, self._scratch, own, window)
        packed_row = builder.add(run["row"], first_row)
        first_head = builder.mul(head, i64(shape.queries * shape.head_bytes))
        self._prepare(fields, packed_row, tokens, first_head)

        end = builder.add(self._last, i64(1))
        with kernel.loop(builder.and_(oldest, i64(-TILE_POSITIONS)), end, i64(TILE_POSITIONS)) as tile:
            begin = kernel.maximum(tile, builder.and_(oldest, i64(-GROUP_POSITIONS)))
            tile_end = kernel.minimum(builder.add(tile, i64(TILE_POSITIONS)), end)
            groups = groups_in(kernel, begin, tile_end)
            self._transpose_kv(keys, values, begin, groups)
            done = kernel.variable(I64)
            builder.store(i64(0), done)
            count = self._tile_rows
            while count:
                with kernel.loop(builder.load(done, typ=I64), builder.sub(rows, i64(count - 1)), i64(count)) as first:
                    self._tiles.add(first, count, begin, tile_end)
                    builder.store(builder.add(first, i64(count)), done)
                count //= 2

        self._write_results(fields, packed_row, first_head, rows)
        kernel.finish()
        return kernel.function

    def _write_results(self, fields: dict[str, Value], packed_row: Value, first_head: Value, rows: Value) -> None:
        """Each row's sum of values over its sum of weights."""
        kernel, shape, layout = self._kernel, self._shape, self._layout
        builder = kernel.builder
        at = builder.add(builder.mul(packed_row, i64(shape.heads * shape.head_bytes)), first_head)
        out = kernel.at(fields["out"], at)
        with kernel.loop(i64(0), rows) as row:
            mine = self._tiles.row(row)
            total = sum_of(kernel, kernel.load(kernel.at(mine, layout.sum_at), _FLOAT_VECTOR, 4))
            inverse = kernel.splat(builder.fdiv(f32(1.0), total), WIDTH)
            token, query = builder.sdiv(row, i64(shape.queries)), builder.srem(row, i64(shape.queries))
            at = builder.mul(token, i64(shape.heads * shape.head_bytes))
            target = kernel.at(out, builder.add(at, builder.mul(query, i64(shape.head_bytes))))
            for part in range(0, shape.head_bytes, VECTOR_BYTES):
                sums = kernel.load(kernel.at(mine, layout.sums_of_values_at + part), _FLOAT_VECTOR, 4)
                kernel.store(builder.fmul(sums, inverse), kernel.at(target, part), 4)

    def _find_run(self, fields: dict[str, Value], block: Value) -> tuple[dict[str, Value], Value]:
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
                for i, part in enumerate(apply_rope(kernel, shape, parts, fields["q_norm"], cos, sin)):
                    scaled = builder.fmul(part, filled(F32, shape.width, scale))
                    products.store(kernel, scaled, kernel.at(mine, step * i))
                for at in range(layout.sums_of_values_at, layout.largest_at, VECTOR_BYTES):
                    kernel.store(ir.Constant(_FLOAT_VECTOR, None), kernel.at(mine, at), 4)
                kernel.store(f32(_NO_SCORE), kernel.at(mine, layout.largest_at), 4)

    def _kv_row(self, rows: Value, position: Value) -> Value:
        """A position's key or value: the nearest one held where there is none, which no weight lets through."""
        kernel, builder = self._kernel, self._kernel.builder
        nearest = kernel.minimum(kernel.maximum(position, self._first), self._last)
        return kernel.at(rows, builder.mul(builder.sub(nearest, self._first), i64(self._shape.kv_row_bytes)))

    def _transpose_kv(self, keys: Value, values: Value, begin: Value, groups: Value) -> None:
        """Keys of each group of positions as columns [words, 32]; values as [positions / per_word, head_dim] words."""
        kernel, shape, layout, products = self._kernel, self._shape, self._layout, self._products
        builder = kernel.builder
        parts = layout.query_bytes // VECTOR_BYTES
        with kernel.loop(i64(0), builder.mul(groups, i64(GROUP_VECTORS))) as number:
            position = builder.add(begin, builder.mul(number, i64(WIDTH)))
            rows = [self._kv_row(keys, builder.add(position, i64(lane))) for lane in range(WIDTH)]
            self._prefetch(rows)
            group, half = builder.sdiv(number, i64(GROUP_VECTORS)), builder.srem(number, i64(GROUP_VECTORS))
            at = builder.mul(group, i64(GROUP_POSITIONS * layout.query_bytes))
            target = kernel.at(self._scratch, builder.add(at, builder.mul(half, i64(VECTOR_BYTES))))
            with kernel.loop(i64(0), i64(parts)) as part:
                loaded = [products.key_words(kernel, shape, row, part) for row in rows]
                place = kernel.at(target, builder.mul(part, i64(WIDTH * GROUP_VECTORS * VECTOR_BYTES)))
                for i, column in enumerate(transposed(kernel, loaded)):
                    kernel.store(column, kernel.at(place, GROUP_VECTORS * VECTOR_BYTES * i), 4)
            if shape.has_scales:
                self._copy_scales(rows, number, WIDTH, layout.key_scales_at)
        laid = kernel.at(self._scratch, layout.values_at)
        per_word = products.per_word
        with kernel.loop(i64(0), builder.mul(groups, i64(GROUP_POSITIONS // per_word))) as number:
            position = builder.add(begin, builder.mul(number, i64(per_word)))
            rows = [self._kv_row(values, builder.add(position, i64(i))) for i in range(per_word)]
            self._prefetch(rows)
            target = kernel.at(laid, builder.mul(number, i64(shape.head_bytes)))
            for part in range(parts):
                for i, words in enumerate(products.value_words(kernel, shape, rows, part)):
                    kernel.store(words, kernel.at(target, VECTOR_BYTES * (per_word * part + i)), 4)
            if shape.has_scales:
                self._copy_scales(rows, number, per_word, layout.value_scales_at)

    def _copy_scales(self, rows: list[Value], number: Value, count: int, at: int) -> None:
        """Of `count` positions at a time, one after another."""
        kernel = self._kernel
        place = kernel.at(self._scratch, kernel.builder.add(kernel.builder.mul(number, i64(4 * count)), i64(at)))
        for i, row in enumerate(rows):
            kernel.store(scale_of(kernel, self._shape, row), kernel.at(place, 4 * i), 4)

    def _prefetch(self, rows: list[Value]) -> None:
        """Ask for the next piece's keys or values, which come while this one is computed with."""
        kernel, row_bytes = self._kernel, self._shape.kv_row_bytes
        for row in rows:
            for at in range(0, row_bytes, 64):
                ahead = kernel.at(row, TILE_POSITIONS * row_bytes + at)
                kernel.call("llvm.prefetch.p0", VOID, [ahead, *(ir.Constant(I32, i) for i in (0, 2, 1))])
