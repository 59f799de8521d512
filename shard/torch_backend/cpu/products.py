"""In what numbers a chunk's attention multiplies: float32, or pairs of bfloat16 that one instruction multiplies and
adds to a float32 sum (AVX512-BF16), twice as many at once.

Operands are words of 32 bits, each one float or a pair of neighbours: of features in scores, of positions where values
are added up.
"""

from __future__ import annotations

from typing import Protocol

from llvmlite import ir

from shard.torch_backend.cpu.builder import BF16, F32, I16, I32, Kernel, Value, vector
from shard.torch_backend.cpu.heads import AttendShape
from shard.torch_backend.cpu.mathematics import WIDTH, float_bytes, load_floats

_WORDS = vector(I32, WIDTH)
_FLOATS = vector(F32, WIDTH)


class Products(Protocol):
    """`per_word`: numbers in a word. `degree`: of the polynomial that weights are worth."""

    name: str
    per_word: int
    degree: int

    def takes(self, shape: AttendShape) -> bool: ...

    def multiply_add(self, kernel: Kernel, sums: Value, a: Value, b: Value) -> Value:
        """Sums float32 [16] + products of the words a and b [16]."""

    def store(self, kernel: Kernel, floats: Value, pointer: Value) -> None:
        """Put float32 numbers down as words."""

    def key_words(self, kernel: Kernel, shape: AttendShape, key: Value, part: Value) -> Value:
        """A key's 16 words from 16 · `part`."""

    def value_words(self, kernel: Kernel, shape: AttendShape, values: list[Value], part: int) -> list[Value]:
        """Of one value, or two at neighbouring positions: the words of features from 16 · per_word · `part`, as
        per_word vectors."""


class FloatProducts:
    """Implements Products, for KV of any dtype."""

    name = "floats"
    per_word = 1
    degree = 6

    def takes(self, shape: AttendShape) -> bool:
        return shape.head_dim % WIDTH == 0

    def multiply_add(self, kernel: Kernel, sums: Value, a: Value, b: Value) -> Value:
        one, other = (kernel.builder.bitcast(words, _FLOATS) for words in (a, b))
        return kernel.fma(one, other, sums)

    def store(self, kernel: Kernel, floats: Value, pointer: Value) -> None:
        kernel.store(floats, pointer, 4)

    def key_words(self, kernel: Kernel, shape: AttendShape, key: Value, part: Value) -> Value:
        at = kernel.builder.mul(part, ir.Constant(part.type, WIDTH * float_bytes(shape.kv_dtype)))
        return kernel.builder.bitcast(load_floats(kernel, kernel.at(key, at), shape.kv_dtype, WIDTH), _WORDS)

    def value_words(self, kernel: Kernel, shape: AttendShape, values: list[Value], part: int) -> list[Value]:
        at = kernel.at(values[0], WIDTH * float_bytes(shape.kv_dtype) * part)
        return [kernel.builder.bitcast(load_floats(kernel, at, shape.kv_dtype, WIDTH), _WORDS)]


class BFloatProducts:
    """Implements Products, for KV in bfloat16, or in integers of 8 bits, which bfloat16 has too: keys and values as
    they are, queries and weights rounded."""

    name = "bfloats"
    per_word = 2
    degree = 4

    def takes(self, shape: AttendShape) -> bool:
        return shape.kv_dtype in ("bfloat16", "int8") and shape.head_dim % (2 * WIDTH) == 0

    def multiply_add(self, kernel: Kernel, sums: Value, a: Value, b: Value) -> Value:
        pairs = [kernel.builder.bitcast(words, vector(BF16, 2 * WIDTH)) for words in (a, b)]
        return kernel.call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, [sums, *pairs])

    def store(self, kernel: Kernel, floats: Value, pointer: Value) -> None:
        kernel.store(kernel.builder.fptrunc(floats, vector(BF16, floats.type.count)), pointer, 2)

    def key_words(self, kernel: Kernel, shape: AttendShape, key: Value, part: Value) -> Value:
        at = kernel.builder.mul(part, ir.Constant(part.type, 2 * WIDTH * float_bytes(shape.kv_dtype)))
        return kernel.builder.bitcast(self._bits(kernel, shape, kernel.at(key, at)), _WORDS)

    def value_words(self, kernel: Kernel, shape: AttendShape, values: list[Value], part: int) -> list[Value]:
        step = 2 * WIDTH * float_bytes(shape.kv_dtype)
        one, other = (self._bits(kernel, shape, kernel.at(value, step * part)) for value in values)
        found = []
        for half in range(2):
            mask = [place for i in range(WIDTH * half, WIDTH * (half + 1)) for place in (i, 2 * WIDTH + i)]
            pairs = kernel.builder.shuffle_vector(one, other, ir.Constant(vector(I32, 2 * WIDTH), mask))
            found.append(kernel.builder.bitcast(pairs, _WORDS))
        return found

    def _bits(self, kernel: Kernel, shape: AttendShape, pointer: Value) -> Value:
        """32 numbers as bfloat16, in integers of 16 bits."""
        if shape.kv_dtype == "bfloat16":
            return kernel.load(pointer, vector(I16, 2 * WIDTH), 2)
        floats = load_floats(kernel, pointer, shape.kv_dtype, 2 * WIDTH)
        rounded = kernel.builder.fptrunc(floats, vector(BF16, 2 * WIDTH))
        return kernel.builder.bitcast(rounded, vector(I16, 2 * WIDTH))
