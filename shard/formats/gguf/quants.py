"""GGUF quants turn rows of a tensor's bytes into floats or into affine groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from shard.formats.affine import AffineForm, AffineRows, quantize_rows
from shard.formats.dtypes import from_bfloat16
from transport.errors import UnsupportedModel


def row_bytes(format: str, columns: int) -> int:
    """Bytes of a row of `columns` elements."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    return columns // int(block) * int(block_bytes)


def check_format(format: str) -> None:
    """Raise UnsupportedModel for a type that can't be turned into floats."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    try:
        values = dequantize_rows(np.zeros((1, int(block_bytes)), np.uint8), format)
    except NotImplementedError:
        values = None
    if values is None or values.shape != (1, block) or values.dtype != np.float32:
        raise UnsupportedModel(
            f"tensors of GGUF type {format} can't be read", hint="take a Q4_K_M, Q5_K_M, Q8_0, F16 or BF16 file"
        )


def dequantize_rows(data: np.ndarray, format: str) -> np.ndarray:
    """uint8 [rows, row bytes] → float32 [rows, columns]."""
    # Corrupt scales overflow; they are checked for nowhere, as in llama.cpp, so they must not warn here either.
    with np.errstate(over="ignore", invalid="ignore"):
        fast = _DEQUANTIZERS.get(format)
        if fast is not None:
            return fast(data).reshape(len(data), -1)
        values: np.ndarray = quants.dequantize(data, GGMLQuantizationType[format])
        return values


def _dequantize_f32(data: np.ndarray) -> np.ndarray:
    return data.view(np.float32)


def _dequantize_f16(data: np.ndarray) -> np.ndarray:
    return data.view(np.float16).astype(np.float32)


def _dequantize_bf16(data: np.ndarray) -> np.ndarray:
    return from_bfloat16(data.view(np.uint16))


def _float16_columns(blocks: np.ndarray, first: int, last: int) -> np.ndarray:
    """Columns [first, last) as float16 numbers → float32."""
    return np.ascontiguousarray(blocks[:, first:last]).view(np.float16).astype(np.float32)


def _float_nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 16] → float32 [blocks, 32]: low nibbles, then high ones."""
    values = np.empty((len(packed), 32), np.float32)
    np.bitwise_and(packed, 15, out=values[:, :16], casting="unsafe")
    np.right_shift(packed, 4, out=values[:, 16:], casting="unsafe")
    return values


def _dequantize_q4_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 18)
    values = _float_nibbles(blocks[:, 2:])
    values -= 8
    values *= _float16_columns(blocks, 0, 2)
    return values


def _dequantize_q4_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 20)
    values = _float_nibbles(blocks[:, 4:])
    values *= _float16_columns(blocks, 0, 2)
    values += _float16_columns(blocks, 2, 4)
    return values


def _dequantize_q8_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 34)
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _float16_columns(blocks, 0, 2)
    return values


def _dequantize_q6_k(data: np.ndarray) -> np.ndarray:
    """Superblocks of 16 groups of 16: 128 bytes of low halves, 64 of two high bits each, 16 signed scales, then d."""
    blocks = data.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    q = np.empty((len(blocks), 2, 4, 32), np.uint8)
    np.bitwise_and(low, 15, out=q[:, :, :2])
    np.right_shift(low, 4, out=q[:, :, 2:])
    for quarter in range(4):
        q[:, :, quarter] |= ((high >> (2 * quarter)) & 3) << 4
    values = q.reshape(-1, 16, 16).astype(np.float32)
    values -= 32
    scales = blocks[:, 192:208].view(np.int8) * _float16_columns(blocks, 208, 210)
    values *= scales[..., None]
    return values


_DEQUANTIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _dequantize_f32,
    "F16": _dequantize_f16,
    "BF16": _dequantize_bf16,
    "Q4_0": _dequantize_q4_0,
    "Q4_1": _dequantize_q4_1,
    "Q8_0": _dequantize_q8_0,
    "Q6_K": _dequantize_q6_k,
}


GROUP = 32
_DENSE = frozenset({"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"})
_AFFINE_BITS_OF = {
    "Q4_0": 4,
    "Q4_1": 4,
    "Q5_0": 5,
    "Q5_1": 5,
    "Q8_0": 8,
    "Q4_K": 4,
    "Q5_K": 5,
    "IQ4_NL": 8,
    "IQ4_XS": 8,
}
_REQUANTIZED_BITS = 8
# The 16 values of IQ4_NL and IQ4_XS (kvalues_iq4nl), with 128 added.
_IQ4_PLUS_128 = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint8)

# q uint8 [groups, 32], scales and biases float32 [groups].
_Groups = tuple[np.ndarray, np.ndarray, np.ndarray]


def affine_form(format: str, shape: tuple[int, ...]) -> AffineForm | None:
    """The form in which a tensor of GGUF type `format` is read; None for floats and for vectors."""
    if format in _DENSE or len(shape) < 2 or shape[-1] % GROUP:
        return None
    bits = _AFFINE_BITS_OF.get(format)
    if bits is None:
        return AffineForm(bits=_REQUANTIZED_BITS, group=GROUP, exact=False)
    return AffineForm(bits=bits, group=GROUP)


def affine_rows(data: np.ndarray, format: str) -> AffineRows:
    """uint8 [rows, row bytes] → the rows in `affine_form`. Scales of corrupt files can be infinite or NaN."""
    read = _AFFINE_READERS.get(format)
    if read is None:
        return quantize_rows(dequantize_rows(data, format), _REQUANTIZED_BITS, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        q, scales, biases = read(data)
    rows = len(data)
    return AffineRows(q=q.reshape(rows, -1), scales=scales.reshape(rows, -1), biases=biases.reshape(rows, -1))


def _float16_at(blocks: np.ndarray, first: int) -> np.ndarray:
    """The float16 number at byte `first` of each block → float32 [blocks]."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)[:, 0]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] → uint8 [..., 2n]: low nibbles, then high ones."""
    half = packed.shape[-1]
    q = np.empty((*packed.shape[:-1], 2 * half), np.uint8)
    np.bitwise_and(packed, 15, out=q[..., :half])
    np.right_shift(packed, 4, out=q[..., half:])
    return q


def _q4_0(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 18)
    scales = _float16_at(blocks, 0)
    return _nibbles(blocks[:, 2:]), scales, -8 * scales


def _q4_1(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 20)
    return _nibbles(blocks[:, 4:]), _float16_at(blocks, 0), _float16_at(blocks, 2)


def _fifth_bits(blocks: np.ndarray, first: int) -> np.ndarray:
    """32 bits from byte `first` of each block on, least significant first → uint8 [blocks, 32] of 0 and 16."""
    bits = np.unpackbits(blocks[:, first : first + 4], axis=1, bitorder="little")
    bits <<= 4
    return bits


def _q5_0(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 22)
    scales = _float16_at(blocks, 0)
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), scales, -16 * scales


def _q5_1(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 24)
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _float16_at(blocks, 0), _float16_at(blocks, 2)


def _q8_0(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 34)
    scales = _float16_at(blocks, 0)
    return blocks[:, 2:] ^ 128, scales, -128 * scales  # Two's complement with 128 added: its first bit turned.


def _iq4_nl(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 18)
    scales = _float16_at(blocks, 0)
    return _IQ4_PLUS_128[_nibbles(blocks[:, 2:])], scales, -128 * scales


def _iq4_xs(data: np.ndarray) -> _Groups:
    """Superblocks of eight groups: d, 16 high bits of scales, 32 low ones, then 16 bytes a group."""
    blocks = data.reshape(-1, 136)
    places = np.arange(8)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> (2 * places).astype(np.uint16) & 3
    low = blocks[:, 4 + places // 2] >> (4 * (places % 2)).astype(np.uint8) & 15
    scales = _float16_at(blocks, 0)[:, None] * ((low | high << 4).astype(np.float32) - 32)
    return _IQ4_PLUS_128[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))], scales, -128 * scales


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d · sc and -dmin · m of a superblock's eight groups, [blocks, 8]: d, dmin, then 8 sc and 8 m of 6 bits."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    sc = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    m = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    return _float16_at(blocks, 0)[:, None] * sc, -_float16_at(blocks, 2)[:, None] * m


def _q4_k(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 144)
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)), *_k_scales(blocks)


def _q5_k(data: np.ndarray) -> _Groups:
    blocks = data.reshape(-1, 176)
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit j of byte i is the fifth of weight i of group j.
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    q |= fifth << 4
    return q, *_k_scales(blocks)


_AFFINE_READERS: dict[str, Callable[[np.ndarray], _Groups]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
