"""What attention kernels do with a token's heads before they look at others: norms, rotary embedding, the way to the
KV. Decode's and a chunk's kernel share it, and so the numbers that they put there."""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from shard.torch_backend.cpu.builder import F32, I8, I32, Kernel, Type, Value, f32, vector
from shard.torch_backend.cpu.mathematics import WIDTH, Held, float_bytes, store_floats, sum_of

SCALE_BYTES = 4
_LARGEST = 127.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendShape:
    """`rotary` features of each head are turned, pairs (i, i + rotary / 2); 0 for none. `eps` is None without norms of
    queries and keys. head_dim is a multiple of 8, rotary one of 16. `softcap` caps scores before the softmax.

    KV is held in `kv_dtype`. A row of int8 is a head's integers and then their scale, float32: x = scale · i.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    kv_dtype: Held
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
    def floats(self) -> Type:
        return vector(F32, self.width)

    def is_supported(self) -> bool:
        width = self.width
        return self.head_dim % width == 0 and self.rotary % (2 * width) == 0 and self.heads % self.kv_heads == 0


def vectors_at(kernel: Kernel, shape: AttendShape, pointer: Value) -> list[Value]:
    """A head of float32."""
    step = 4 * shape.width
    return [kernel.load(kernel.at(pointer, at), shape.floats, 4) for at in range(0, shape.head_bytes, step)]


def turned(kernel: Kernel, shape: AttendShape, parts: list[Value], norm: Value, cos: Value, sin: Value) -> list[Value]:
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


def store_kv(kernel: Kernel, shape: AttendShape, parts: list[Value], pointer: Value) -> None:
    """Put a head down as a row of KV."""
    if shape.kv_dtype == "int8":
        _store_integers(kernel, shape, parts, pointer)
        return
    step = shape.width * float_bytes(shape.kv_dtype)
    for i, part in enumerate(parts):
        store_floats(kernel, part, kernel.at(pointer, step * i), shape.kv_dtype)


def scale_of(kernel: Kernel, shape: AttendShape, row: Value) -> Value:
    """The scale of a row of int8."""
    return kernel.load(kernel.at(row, shape.head_dim), F32, 4)


def _store_integers(kernel: Kernel, shape: AttendShape, parts: list[Value], pointer: Value) -> None:
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
