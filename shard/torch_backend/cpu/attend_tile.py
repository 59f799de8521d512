"""The innermost part of prompts' attention: what one piece of positions adds to the results of a few query rows.

Scores are kept in registers while they are summed up over features; then the rows' softmax so far; then sums of values,
in registers over positions.
"""

from __future__ import annotations

from llvmlite import ir

from shard.torch_backend.cpu.builder import F32, I32, Kernel, Value, filled, i64, vector
from shard.torch_backend.cpu.heads import AttendShape
from shard.torch_backend.cpu.mathematics import LOG2_E, WIDTH, largest_of, power_of_two, softcapped
from shard.torch_backend.cpu.products import Products

PIECE = 256
"""Positions whose scores are held at once."""
GROUP = 32
"""Positions whose scores are kept in registers together."""
VECTOR_BYTES = 4 * WIDTH
SPAN = GROUP // WIDTH

_FLOATS = vector(F32, WIDTH)
_WORDS = vector(I32, WIDTH)
_VALUE_ROWS = 4
_FEATURES = 4
"""Vectors of features whose sums are kept in registers together, for `_VALUE_ROWS` rows."""


class Layout:
    """Of a task's scratch: a piece's keys in columns, its values, scores of 8 rows, and by how much their sums so far
    shrink; then for each row its query, sums of values, sum of weights, and largest score."""

    def __init__(self, shape: AttendShape, products: Products) -> None:
        self.query_bytes = shape.head_bytes // products.per_word
        self.score_bytes = 4 * PIECE
        self.values_at = PIECE * self.query_bytes
        self.scores_at = self.values_at + PIECE // products.per_word * shape.head_bytes
        self.scales_at = self.scores_at + 8 * self.score_bytes
        # Of keys and of values held in 8 bits: a float each.
        self.key_scales_at = self.scales_at + 8 * VECTOR_BYTES
        self.value_scales_at = self.key_scales_at + (4 * PIECE if shape.has_scales else 0)
        self.rows_at = self.value_scales_at + (4 * PIECE if shape.has_scales else 0)
        self.row_bytes = self.query_bytes + shape.head_bytes + 2 * VECTOR_BYTES
        self.sums_of_values_at = self.query_bytes
        self.sum_at = self.sums_of_values_at + shape.head_bytes
        self.largest_at = self.sum_at + VECTOR_BYTES


def groups_in(kernel: Kernel, begin: Value, end: Value) -> Value:
    """How many groups of positions begin in [begin, end)."""
    builder = kernel.builder
    return builder.sdiv(builder.add(builder.sub(end, begin), i64(GROUP - 1)), i64(GROUP))


class Tiles:
    """Writes them into a task's function. `scratch`: its memory, as in `Layout`; `own`: the position of its row 0's
    token; `window`: how many positions a token sees."""

    def __init__(
        self, kernel: Kernel, shape: AttendShape, products: Products, scratch: Value, own: Value, window: Value
    ) -> None:
        self._kernel, self._shape, self._products = kernel, shape, products
        self._layout = Layout(shape, products)
        self._scratch, self._own, self._window = scratch, own, window

    def row(self, row: Value) -> Value:
        """Where a row has its query and results."""
        at = self._kernel.builder.mul(row, i64(self._layout.row_bytes))
        return self._kernel.at(self._scratch, self._kernel.builder.add(at, i64(self._layout.rows_at)))

    def add(self, first: Value, count: int, begin: Value, piece_end: Value) -> None:
        """A piece's part in the results of a few rows."""
        kernel, builder = self._kernel, self._kernel.builder
        queries = i64(self._shape.queries)
        token = builder.add(self._own, builder.sdiv(first, queries))
        last_token = builder.add(self._own, builder.sdiv(builder.add(first, i64(count - 1)), queries))
        end = kernel.minimum(piece_end, builder.add(last_token, i64(1)))
        with kernel.only_if(builder.icmp_signed("<", begin, end)):
            groups = groups_in(kernel, begin, end)
            self._score(first, count, groups)
            behind_first = builder.icmp_signed(
                ">", builder.add(begin, builder.mul(groups, i64(GROUP))), builder.add(token, i64(1))
            )
            too_old = builder.icmp_signed("<=", begin, builder.sub(last_token, self._window))
            with kernel.only_if(builder.or_(behind_first, too_old)):
                self._mask(first, count, begin, groups)
            with kernel.loop(i64(0), i64(count)) as number:
                self._soften(self.row(builder.add(first, number)), number, groups)
            for done in range(0, count, _VALUE_ROWS):
                self._gather(first, range(done, min(count, done + _VALUE_ROWS)), groups)

    def _scores(self, number: Value) -> Value:
        at = self._kernel.builder.mul(number, i64(self._layout.score_bytes))
        return self._kernel.at(self._scratch, self._kernel.builder.add(at, i64(self._layout.scores_at)))

    def _score(self, first: Value, count: int, groups: Value) -> None:
        kernel, shape, layout, products = self._kernel, self._shape, self._layout, self._products
        builder = kernel.builder
        queries = [self.row(builder.add(first, i64(i))) for i in range(count)]
        sums = [[kernel.variable(_FLOATS) for _ in range(SPAN)] for _ in queries]
        with kernel.loop(i64(0), groups) as group:
            columns = kernel.at(self._scratch, builder.mul(group, i64(GROUP * layout.query_bytes)))
            for total in (total for row in sums for total in row):
                builder.store(ir.Constant(_FLOATS, None), total)
            with kernel.loop(i64(0), i64(layout.query_bytes), i64(4)) as at:
                column = kernel.at(columns, builder.mul(at, i64(GROUP)))
                words = [kernel.load(kernel.at(column, VECTOR_BYTES * i), _WORDS, 4) for i in range(SPAN)]
                for query, row in zip(queries, sums, strict=True):
                    one = kernel.splat(kernel.load(kernel.at(query, at), I32, 4), WIDTH)
                    for word, total in zip(words, row, strict=True):
                        added = products.multiply_add(kernel, builder.load(total, typ=_FLOATS), one, word)
                        builder.store(added, total)
            for number, row in enumerate(sums):
                place = kernel.at(self._scores(i64(number)), builder.mul(group, i64(4 * GROUP)))
                for i, total in enumerate(row):
                    score = builder.load(total, typ=_FLOATS)
                    if shape.has_scales:
                        scales = kernel.at(self._scratch, builder.mul(group, i64(4 * GROUP)))
                        scale = kernel.load(kernel.at(scales, layout.key_scales_at + VECTOR_BYTES * i), _FLOATS, 4)
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
            with kernel.loop(i64(0), builder.mul(groups, i64(GROUP)), i64(WIDTH)) as at:
                before = kernel.splat(builder.trunc(builder.sub(token, at), I32), WIDTH)
                # 0 ≤ behind < window, as one unsigned comparison.
                is_visible = builder.icmp_unsigned("<", builder.sub(before, lanes), window)
                place = kernel.at(scores, builder.mul(at, i64(4)))
                score = kernel.load(place, _FLOATS, 4)
                kernel.store(builder.select(is_visible, score, filled(F32, WIDTH, float("-inf"))), place, 4)

    def _soften(self, row: Value, number: Value, groups: Value) -> None:
        """Scores → weights 2^(score − largest), in their place; the row's largest score and sum of weights."""
        kernel, layout, products = self._kernel, self._layout, self._products
        builder = kernel.builder
        scores = self._scores(number)
        score_bytes = builder.mul(groups, i64(4 * GROUP))
        largest, total = kernel.variable(_FLOATS), kernel.variable(_FLOATS)
        before = kernel.load(kernel.at(row, layout.largest_at), F32, 4)
        builder.store(kernel.splat(before, WIDTH), largest)
        with kernel.loop(i64(0), score_bytes, i64(VECTOR_BYTES)) as at:
            score, held = kernel.load(kernel.at(scores, at), _FLOATS, 4), builder.load(largest, typ=_FLOATS)
            builder.store(builder.select(builder.fcmp_ordered(">", score, held), score, held), largest)
        found = largest_of(kernel, builder.load(largest, typ=_FLOATS))
        kernel.store(found, kernel.at(row, layout.largest_at), 4)
        maxima = kernel.splat(found, WIDTH)
        shrunk = power_of_two(kernel, builder.fsub(kernel.splat(before, WIDTH), maxima), products.degree)
        at = builder.add(builder.mul(number, i64(VECTOR_BYTES)), i64(layout.scales_at))
        kernel.store(shrunk, kernel.at(self._scratch, at), 4)
        sum_place = kernel.at(row, layout.sum_at)
        builder.store(builder.fmul(kernel.load(sum_place, _FLOATS, 4), shrunk), total)
        with kernel.loop(i64(0), score_bytes, i64(VECTOR_BYTES)) as at:
            score = kernel.load(kernel.at(scores, at), _FLOATS, 4)
            weight = power_of_two(kernel, builder.fsub(score, maxima), products.degree)
            builder.store(builder.fadd(builder.load(total, typ=_FLOATS), weight), total)
            if self._shape.has_scales:
                place = kernel.at(self._scratch, builder.add(at, i64(layout.value_scales_at)))
                weight = builder.fmul(weight, kernel.load(place, _FLOATS, 4))
            products.store(kernel, weight, kernel.at(scores, builder.sdiv(at, i64(products.per_word))))
        kernel.store(builder.load(total, typ=_FLOATS), sum_place, 4)

    def _gather(self, first: Value, numbers: range, groups: Value) -> None:
        """Sums of values so far, shrunk, and weight · value of the piece, for a few rows."""
        kernel, shape, layout, products = self._kernel, self._shape, self._layout, self._products
        builder = kernel.builder
        rows = [self.row(builder.add(first, i64(number))) for number in numbers]
        weights = [self._scores(i64(number)) for number in numbers]
        scales = [
            kernel.load(kernel.at(self._scratch, layout.scales_at + VECTOR_BYTES * number), _FLOATS, 4)
            for number in numbers
        ]
        word_bytes = builder.mul(groups, i64(4 * GROUP // products.per_word))
        vectors = shape.head_bytes // VECTOR_BYTES
        for part in range(0, vectors, _FEATURES):
            places = [VECTOR_BYTES * i for i in range(part, min(vectors, part + _FEATURES))]
            sums = [[kernel.variable(_FLOATS) for _ in places] for _ in rows]
            for row, scale, totals in zip(rows, scales, sums, strict=True):
                for place, total in zip(places, totals, strict=True):
                    held = kernel.load(kernel.at(row, layout.sums_of_values_at + place), _FLOATS, 4)
                    builder.store(builder.fmul(held, scale), total)
            with kernel.loop(i64(0), word_bytes, i64(4)) as at:
                value = kernel.at(self._scratch, builder.mul(at, i64(shape.head_dim)))
                words = [kernel.load(kernel.at(value, layout.values_at + place), _WORDS, 4) for place in places]
                for weight, totals in zip(weights, sums, strict=True):
                    one = kernel.splat(kernel.load(kernel.at(weight, at), I32, 4), WIDTH)
                    for word, total in zip(words, totals, strict=True):
                        added = products.multiply_add(kernel, builder.load(total, typ=_FLOATS), one, word)
                        builder.store(added, total)
            for row, totals in zip(rows, sums, strict=True):
                for place, total in zip(places, totals, strict=True):
                    at = kernel.at(row, layout.sums_of_values_at + place)
                    kernel.store(builder.load(total, typ=_FLOATS), at, 4)
