"""Affine rows → the order in which the kernel reads them.

Tiles of as many rows as a vector has lanes. A tile is its groups one after another: the scales of all rows, their zeros
(float16), then blocks of 32 columns; in a block, vectors that hold 4 columns of every row. With 4 bits, columns 0 to 15
of a block are the low halves of its bytes, columns 16 to 31 the high ones.

zero = bias + offset · scale, with offset 0 or 2^(bits − 1), whichever rounds to float16 with less error: formats with a
minimum (Q4_1) store the bias itself in 16 bits, symmetric ones (Q4_0, AWQ) have a zero of 0. Both are kept times
2^exponent, which brings a matrix of small weights out of the reach of float16's subnormals and rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shard.affine import AffineForm, AffineRows
from shard.torch_backend.cpu.matmul import BLOCK, tile_bytes
from transport.errors import BadCheckpoint

_LARGEST_FLOAT16 = 65504.0
_USUAL_LARGEST = 64.0
"""What the largest scale or bias is brought to: a thousand times that is a float16, and a millionth no subnormal."""
_LARGEST_EXPONENT = 100


def stored_bits(form: AffineForm) -> int:
    """4, or 8 for what has more than 4 bits."""
    return 4 if form.bits <= 4 else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A matrix [rows, columns] in tiles; rows are padded to whole tiles with zeros."""

    rows: int
    columns: int
    bits: int
    group: int
    lanes: int

    @property
    def num_tiles(self) -> int:
        return -(-self.rows // self.lanes)

    @property
    def tile_bytes(self) -> int:
        return tile_bytes(self.columns // BLOCK, self.group // BLOCK, self.bits, self.lanes)

    @property
    def num_bytes(self) -> int:
        return self.num_tiles * self.tile_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How the scales and zeros of a matrix are kept: see above."""

    offset: int
    exponent: int


def best_numbers(rows: AffineRows, bits: int) -> Numbers:
    """For a matrix of which these are some rows: the offset that makes their zeros rounder, and the exponent that
    leaves room to both sides."""
    middle = 1 << (bits - 1)
    largest = max(float(np.abs(numbers).max(initial=0.0)) for numbers in (rows.scales, rows.biases))
    exponent = 0
    if 0 < largest < _USUAL_LARGEST:
        exponent = min(_LARGEST_EXPONENT, int(np.log2(_USUAL_LARGEST / largest)))
    grown = np.float32(2.0**exponent)
    scales, biases = rows.scales * grown, rows.biases * grown

    def error(zeros: np.ndarray) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = zeros.astype(np.float16).astype(np.float32)
            return float(np.abs(zeros - rounded).sum(dtype=np.float64))

    as_bias, as_zero = error(biases), error(biases + np.float32(middle) * scales)
    return Numbers(offset=0 if as_bias <= as_zero else middle, exponent=exponent)


def pack_rows(name: str, rows: AffineRows, layout: Layout, kept: Numbers, out: np.ndarray, *, signed: bool) -> None:
    """Write `rows` (whole tiles of them, or the last ones) into `out`, uint8 [tiles, tile_bytes].

    Raises BadCheckpoint where a scale or zero is not a number that float16 can hold.
    """
    lanes, bits = layout.lanes, layout.bits
    num_tiles, groups = len(out), layout.columns // layout.group
    blocks = layout.group // BLOCK
    q = _padded(rows.q, num_tiles * lanes)
    if signed and bits == 8:
        q = q ^ np.uint8(0x80)
    packed = out.reshape(num_tiles, groups, -1)
    zeros = rows.biases + np.float32(kept.offset) * rows.scales if kept.offset else rows.biases
    grown = np.float32(2.0**kept.exponent)
    for position, numbers in enumerate((rows.scales * grown, zeros * grown)):
        if not np.abs(numbers).max(initial=0.0) <= _LARGEST_FLOAT16:
            raise BadCheckpoint(
                f"{name} has a scale or minimum far beyond its other ones, or one that is no number",
                hint="the file is damaged: download it again",
            )
        halves = _padded(numbers.astype(np.float16), num_tiles * lanes).reshape(num_tiles, lanes, groups)
        factors = packed[:, :, 2 * lanes * position : 2 * lanes * (position + 1)].view(np.float16)
        factors[...] = halves.swapaxes(1, 2)
    # Four columns of a row are one 32-bit word: [tiles, lanes, groups, blocks, 8] → [tiles, groups, blocks, 8, lanes].
    words = q.view(np.uint32).reshape(num_tiles, lanes, groups, blocks, 8).transpose(0, 2, 3, 4, 1)
    place = packed[:, :, 4 * lanes :].view(np.uint32).reshape(num_tiles, groups, blocks, bits, lanes)
    if bits == 8:
        place[...] = words
    else:
        np.bitwise_or(words[:, :, :, :4], words[:, :, :, 4:] << np.uint32(4), out=place)


def _padded(rows: np.ndarray, num_rows: int) -> np.ndarray:
    if len(rows) == num_rows:
        return np.ascontiguousarray(rows)
    padded = np.zeros((num_rows, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


def unpack_rows(packed: np.ndarray, layout: Layout, kept: Numbers, indices: np.ndarray, *, signed: bool) -> np.ndarray:
    """float32 [len(indices), columns]: rows of a packed matrix, uint8 [tiles, tile_bytes], dequantized."""
    lanes, bits = layout.lanes, layout.bits
    tiles, lane = np.divmod(indices, lanes)
    count, groups, blocks = len(indices), layout.columns // layout.group, layout.group // BLOCK
    whole = packed.reshape(layout.num_tiles, groups, -1)
    factors = whole[:, :, : 4 * lanes].view(np.float16)
    scales = factors[tiles, :, lane].astype(np.float32)
    zeros = factors[tiles, :, lanes + lane].astype(np.float32)
    words = whole[:, :, 4 * lanes :].view(np.uint32).reshape(layout.num_tiles, groups, blocks, bits, lanes)
    q = np.ascontiguousarray(words[tiles, :, :, :, lane]).view(np.uint8).reshape(count, groups, blocks, 4 * bits)
    if bits == 4:
        q = np.concatenate((q & np.uint8(15), q >> np.uint8(4)), axis=-1)
    elif signed:
        q = q ^ np.uint8(0x80)
    values = q.reshape(count, groups, layout.group).astype(np.float32) - np.float32(kept.offset)
    values *= scales[..., None]
    values += zeros[..., None]
    values *= np.float32(2.0**-kept.exponent)
    return values.reshape(count, layout.columns)
