"""Attention kernels share a head's norm and rotary embedding, its rows of KV, and the numbers they multiply in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llvmlite import ir

from shard.torch_backend.cpu.ir_builder import BF16, F32, I8, I16, I32, IrType, Kernel, Value, f32, vector
from shard.torch_backend.cpu.vector_math import WIDTH, KVDType, float_bytes, load_floats, store_floats, sum_of

SCALE_BYTES = 4
_LARGEST = 127.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """`rotary` features of each head are turned, pairs (i, i + rotary / 2); 0 for none. `eps` is None without norms of
    queries and keys. head_dim is a multiple of 8, rotary one of 16. `softcap` caps scores before the softmax.

    KV is held in `kv_dtype`. A row of int8 is a head's integers and then their scale, float32: x = scale · i.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    kv_dtype: KVDType
    scale: float
    eps: float | None
    softcap: float | None = None

    @property
    def queries(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def head_bytes(self) -> int:
        """Of a head in float32."""
        return 4 * self.head_dim

    @property
    def kv_row_bytes(self) -> int:
        """Of one position's key, or value, of one head."""
        return self.head_dim * float_bytes(self.kv_dtype) + (SCALE_BYTES if self.has_scales else 0)

    @property
    def has_scales(self) -> bool:
        return self.kv_dtype == "int8"

    @property
    def width(self) -> int:
        """Floats of a head that are handled at once: halves of the turned features must be whole vectors."""
        return WIDTH if self.head_dim % WIDTH == 0 and self.rotary % (2 * WIDTH) == 0 else WIDTH // 2

    @property
    def floats(self) -> IrType:
        return vector(F32, self.width)

    def is_supported(self) -> bool:
        width = self.width
        return self.head_dim % width == 0 and self.rotary % (2 * width) == 0 and self.heads % self.kv_heads == 0


def vectors_at(kernel: Kernel, shape: AttentionShape, pointer: Value) -> list[Value]:
    """A head of float32."""
    step = 4 * shape.width
    return [kernel.load(kernel.at(pointer, at), shape.floats, 4) for at in range(0, shape.head_bytes, step)]


def apply_rope(
    kernel: Kernel, shape: AttentionShape, parts: list[Value], norm: Value, cos: Value, sin: Value
) -> list[Value]:
    """A head, normed and turned by its token's angles: cosines and sines [rotary / 2] float32."""
    builder = kernel.builder
    if shape.eps is not None:
        squares = ir.Constant(shape.floats, None)
        for part in parts:
            squares = kernel.fma(part, part, squares)
        mean = builder.fdiv(sum_of(kernel, squares), f32(float(shape.head_dim)))
        root = kernel.unary("sqrt", builder.fadd(mean, f32(shape.eps)))
        factor = kernel.splat(builder.fdiv(f32(1.0), root), shape.width)
        weights = vectors_at(kernel, shape, norm)
        parts = [builder.fmul(builder.fmul(part, factor), w) for part, w in zip(parts, weights, strict=True)]
    half = shape.rotary // 2 // shape.width
    found = list(parts)
    for i in range(half):
        c, s = (kernel.load(kernel.at(table, 4 * shape.width * i), shape.floats, 4) for table in (cos, sin))
        a, b = parts[i], parts[i + half]
        found[i] = builder.fsub(builder.fmul(a, c), builder.fmul(b, s))
        found[i + half] = builder.fadd(builder.fmul(b, c), builder.fmul(a, s))
    return found


def store_kv(kernel: Kernel, shape: AttentionShape, parts: list[Value], pointer: Value) -> None:
    """Put a head down as a row of KV."""
    if shape.kv_dtype == "int8":
        _store_integers(kernel, shape, parts, pointer)
        return
    step = shape.width * float_bytes(shape.kv_dtype)
    for i, part in enumerate(parts):
        store_floats(kernel, part, kernel.at(pointer, step * i), shape.kv_dtype)


def scale_of(kernel: Kernel, shape: AttentionShape, row: Value) -> Value:
    """The scale of a row of int8."""
    return kernel.load(kernel.at(row, shape.head_dim), F32, 4)


def _store_integers(kernel: Kernel, shape: AttentionShape, parts: list[Value], pointer: Value) -> None:
    builder, width = kernel.builder, shape.width
    sizes = [kernel.unary("fabs", part) for part in parts]
    while len(sizes) > 1:
        sizes = [kernel.call(f"llvm.maximum.v{width}f32", shape.floats, sizes[:2]), *sizes[2:]]
    # Of a NaN this makes NaN, and so of the whole row: what is wrong shows.
    largest = kernel.call(f"llvm.vector.reduce.fmaximum.v{width}f32", F32, sizes)
    some = builder.fcmp_ordered(">", largest, f32(1e-30))
    inverse = builder.select(some, builder.fdiv(f32(_LARGEST), largest), f32(0.0))
    for i, part in enumerate(parts):
        rounded = kernel.unary("rint", builder.fmul(part, kernel.splat(inverse, width)))
        integers = builder.trunc(builder.fptosi(rounded, vector(I32, width)), vector(I8, width))
        kernel.store(integers, kernel.at(pointer, width * i))
    kernel.store(builder.fmul(largest, f32(1 / _LARGEST)), kernel.at(pointer, shape.head_dim), 4)


_WORDS = vector(I32, WIDTH)
_FLOATS = vector(F32, WIDTH)


class Products(Protocol):
    """`per_word`: numbers in a word. `degree`: of the polynomial that weights are worth."""

    name: str
    per_word: int
    degree: int

    def supports(self, shape: AttentionShape) -> bool: ...

    def multiply_add(self, kernel: Kernel, sums: Value, a: Value, b: Value) -> Value:
        """Sums float32 [16] + products of the words a and b [16]."""

    def store(self, kernel: Kernel, floats: Value, pointer: Value) -> None:
        """Put float32 numbers down as words."""

    def key_words(self, kernel: Kernel, shape: AttentionShape, key: Value, part: Value) -> Value:
        """A key's 16 words from 16 · `part`."""

    def value_words(self, kernel: Kernel, shape: AttentionShape, values: list[Value], part: int) -> list[Value]:
        """Of one value, or two at neighbouring positions: the words of features from 16 · per_word · `part`, as
        per_word vectors."""


class FloatProducts:
    """Implements Products, for KV of any dtype."""

    name = "floats"
    per_word = 1
    degree = 6

    def supports(self, shape: AttentionShape) -> bool:
        return shape.head_dim % WIDTH == 0

    def multiply_add(self, kernel: Kernel, sums: Value, a: Value, b: Value) -> Value:
        one, other = (kernel.builder.bitcast(words, _FLOATS) for words in (a, b))
        return kernel.fma(one, other, sums)

    def store(self, kernel: Kernel, floats: Value, pointer: Value) -> None:
        kernel.store(floats, pointer, 4)

    def key_words(self, kernel: Kernel, shape: AttentionShape, key: Value, part: Value) -> Value:
        at = kernel.builder.mul(part, ir.Constant(part.type, WIDTH * float_bytes(shape.kv_dtype)))
        return kernel.builder.bitcast(load_floats(kernel, kernel.at(key, at), shape.kv_dtype, WIDTH), _WORDS)

    def value_words(self, kernel: Kernel, shape: AttentionShape, values: list[Value], part: int) -> list[Value]:
        at = kernel.at(values[0], WIDTH * float_bytes(shape.kv_dtype) * part)
        return [kernel.builder.bitcast(load_floats(kernel, at, shape.kv_dtype, WIDTH), _WORDS)]


class BFloatProducts:
    """Implements Products, for KV in bfloat16, or in integers of 8 bits, which bfloat16 has too: keys and values as
    they are, queries and weights rounded."""

    name = "bfloats"
    per_word = 2
    degree = 4

    def supports(self, shape: AttentionShape) -> bool:
        return shape.kv_dtype in ("bfloat16", "int8") and shape.head_dim % (2 * WIDTH) == 0

    def multiply_add(self, kernel: Kernel, sums: Value, a: Value, b: Value) -> Value:
        pairs = [kernel.builder.bitcast(words, vector(BF16, 2 * WIDTH)) for words in (a, b)]
        return kernel.call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, [sums, *pairs])

    def store(self, kernel: Kernel, floats: Value, pointer: Value) -> None:
        kernel.store(kernel.builder.fptrunc(floats, vector(BF16, floats.type.count)), pointer, 2)

    def key_words(self, kernel: Kernel, shape: AttentionShape, key: Value, part: Value) -> Value:
        at = kernel.builder.mul(part, ir.Constant(part.type, 2 * WIDTH * float_bytes(shape.kv_dtype)))
        return kernel.builder.bitcast(self._bits(kernel, shape, kernel.at(key, at)), _WORDS)

    def value_words(self, kernel: Kernel, shape: AttentionShape, values: list[Value], part: int) -> list[Value]:
        step = 2 * WIDTH * float_bytes(shape.kv_dtype)
        one, other = (self._bits(kernel, shape, kernel.at(value, step * part)) for value in values)
        found = []
        for half in range(2):
            mask = [place for i in range(WIDTH * half, WIDTH * (half + 1)) for place in (i, 2 * WIDTH + i)]
            pairs = kernel.builder.shuffle_vector(one, other, ir.Constant(vector(I32, 2 * WIDTH), mask))
            found.append(kernel.builder.bitcast(pairs, _WORDS))
        return found

    def _bits(self, kernel: Kernel, shape: AttentionShape, pointer: Value) -> Value:
        """32 numbers as bfloat16, in integers of 16 bits."""
        if shape.kv_dtype == "bfloat16":
            return kernel.load(pointer, vector(I16, 2 * WIDTH), 2)
        floats = load_floats(kernel, pointer, shape.kv_dtype, 2 * WIDTH)
        rounded = kernel.builder.fptrunc(floats, vector(BF16, 2 * WIDTH))
        return kernel.builder.bitcast(rounded, vector(I16, 2 * WIDTH))
