"""Quantized projections on the CPU: the order in which the kernel reads weights, packed matrices, and calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from shard.formats.affine import AffineForm, AffineRows
from shard.formats.checkpoint import Checkpoint
from shard.torch_backend.cpu.compile import new_fields
from shard.torch_backend.cpu.matmul_kernel import (
    BLOCK,
    FACTOR_BYTES,
    FIELDS,
    Precision,
    activation_bytes,
    matrix_kernels,
    tile_bytes,
)
from shard.torch_backend.cpu.program import Program, Scratch, empty_aligned
from transport.errors import BadCheckpoint

_LARGEST_FLOAT16 = 65504.0
_USUAL_LARGEST = 64.0
"""What the largest scale or bias is brought to: a thousand times that is a float16, and a millionth no subnormal."""
_LARGEST_EXPONENT = 100


def stored_bits(form: AffineForm) -> int:
    """4, or 8 for what has more than 4 bits."""
    return 4 if form.bits <= 4 else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLayout:
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
class ScaleEncoding:
    """How the scales and zeros of a matrix are kept: see above."""

    offset: int
    exponent: int


def choose_encoding(rows: AffineRows, bits: int) -> ScaleEncoding:
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
    return ScaleEncoding(offset=0 if as_bias <= as_zero else middle, exponent=exponent)


def pack_rows(
    name: str, rows: AffineRows, layout: TileLayout, encoding: ScaleEncoding, out: np.ndarray, *, signed: bool
) -> None:
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
    zeros = rows.biases + np.float32(encoding.offset) * rows.scales if encoding.offset else rows.biases
    grown = np.float32(2.0**encoding.exponent)
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


def unpack_rows(
    packed: np.ndarray, layout: TileLayout, encoding: ScaleEncoding, indices: np.ndarray, *, signed: bool
) -> np.ndarray:
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
    values = q.reshape(count, groups, layout.group).astype(np.float32) - np.float32(encoding.offset)
    values *= scales[..., None]
    values += zeros[..., None]
    values *= np.float32(2.0**-encoding.exponent)
    return values.reshape(count, layout.columns)


_SAMPLE_ROWS = 64
_PIECE_WEIGHTS = 1 << 20
_CACHED_ACTIVATION_BYTES = 1 << 18
_ROWS_STEP = 8
_TEAM_WORK = 1 << 17
"""Products in a call from which on a team is worth waking."""

_SCRATCH = Scratch()
_BLOCK_BYTES = activation_bytes(16) + FACTOR_BYTES
"""Of scratch for a block of a row: first all activations, then all factors."""

_INDEX = {name: position for position, name in enumerate(FIELDS)}


class PackedMatrix:
    """One matrix in the kernel's order. `kept`: see `packing`."""

    def __init__(self, layout: TileLayout, encoding: ScaleEncoding, packed: np.ndarray) -> None:
        self.layout = layout
        self.encoding = encoding
        self.packed = packed
        kernels = matrix_kernels()
        target = kernels.target
        self._kernels = kernels
        self.signed = target.signed
        shift = 128 if target.signed and layout.bits == 8 else 0
        blocks = layout.columns // BLOCK
        at_once = _CACHED_ACTIVATION_BYTES // (2 * layout.columns) // _ROWS_STEP * _ROWS_STEP
        self._fields, self._address = new_fields(len(FIELDS))
        for name, value in (
            ("weights", packed.ctypes.data),
            ("blocks", blocks),
            ("tiles", layout.num_tiles),
            ("rows_at_once", max(_ROWS_STEP, at_once)),
            ("group_blocks", layout.group // BLOCK),
            ("offset", encoding.offset - shift),
            ("exponent", encoding.exponent),
        ):
            self._fields[_INDEX[name]] = value

    def multiply(self, x: torch.Tensor, y_address: int, y_row_bytes: int, precision: Precision) -> None:
        """y = x · Wᵀ: x float32 [rows, columns] with contiguous rows; y float32 with room for whole tiles."""
        layout, fields = self.layout, self._fields
        rows = x.shape[0]
        blocks = rows * layout.columns // BLOCK
        activations = _SCRATCH.reserve(blocks * _BLOCK_BYTES)
        fields[1] = x.data_ptr()
        fields[2] = activations
        fields[3] = activations + blocks * activation_bytes(16)
        fields[4] = y_address
        fields[5] = rows
        fields[8] = x.stride(0) * 4
        fields[9] = y_row_bytes
        work = rows * layout.rows * layout.columns
        threads = torch.get_num_threads() if work >= _TEAM_WORK else 1
        self._kernels.kernel(layout.bits, precision)(self._address, rows, threads)

    def add_to(
        self, program: Program, x: torch.Tensor, y_address: int, y_row_bytes: int, threads: int, precision: Precision
    ) -> None:
        """Put the product of rows into a program: x float32 [rows, columns], contiguous."""
        layout = self.layout
        rows = x.shape[0]
        blocks = rows * layout.columns // BLOCK
        scratch = program.scratch(blocks * _BLOCK_BYTES)
        fields, address = new_fields(len(FIELDS))
        fields[:] = list(self._fields)
        for name, value in (
            ("x", x.data_ptr()),
            ("activations", scratch),
            ("factors", scratch + blocks * activation_bytes(16)),
            ("y", y_address),
            ("rows", rows),
            ("x_row_bytes", 4 * layout.columns),
            ("y_row_bytes", y_row_bytes),
        ):
            fields[_INDEX[name]] = value
        program.keep(self)
        program.counts_rows(fields, _INDEX["rows"])
        threads = threads if rows * layout.rows * layout.columns >= _TEAM_WORK else 1
        self._kernels.kernel(layout.bits, precision).add_to(program, (fields, address), rows, threads)


class CpuAffineLinear:
    """Implements Linear: several matrices with one input, outputs side by side. Decode rows keep 16 bits of their
    activations; prefill rows `prefill` bits."""

    def __init__(self, parts: Sequence[PackedMatrix], prefill: Precision) -> None:
        self._parts = parts
        self._prefill = prefill
        self.columns = parts[0].layout.columns
        self.out = sum(part.layout.rows for part in parts)
        self.num_bytes = sum(part.packed.nbytes for part in parts)
        lanes = parts[0].layout.lanes
        self._places: list[int] = []
        place = 0
        for part in parts:
            self._places.append(place)
            place += part.layout.rows
        # A part's last tile writes beyond its own columns: into the next part's, which comes after, or into padding.
        last = parts[-1].layout
        self._width = place - last.rows + last.num_tiles * lanes

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        """x [rows, columns] float32 → [rows, out] float32 (a view: its rows may be padded)."""
        rows = x.shape[0]
        y = torch.empty((rows, self._width), dtype=torch.float32)
        if num_decode:
            self._multiply(x[:num_decode] if num_decode < rows else x, y, 0, 16)
        if num_decode < rows:
            self._multiply(x[num_decode:] if num_decode else x, y, num_decode, self._prefill)
        return y if self._width == self.out else y[:, : self.out]

    def add_to(self, program: Program, kind: str, x: torch.Tensor, threads: int, *, is_decode: bool) -> torch.Tensor:
        """Put x · Wᵀ into a program, for the rows [rows, columns] float32 that x will hold when it is run → where they
        will be, [rows, out] float32, in the buffer of that kind."""
        precision = 16 if is_decode else self._prefill
        y = program.rows(kind, x.shape[0], self._width)
        for part, place in zip(self._parts, self._places, strict=True):
            part.add_to(program, x, y.data_ptr() + 4 * place, 4 * self._width, threads, precision)
        return y[:, : self.out]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W, float32 [len(ids), columns]: an embedding that shares its matrix with the head."""
        indices = ids.numpy()
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.out:
            raise IndexError(f"rows {indices.min()} to {indices.max()} of a matrix with {self.out}")
        gathered = np.empty((len(indices), self.columns), np.float32)
        for part, place in zip(self._parts, self._places, strict=True):
            mine = (indices >= place) & (indices < place + part.layout.rows)
            if mine.any():
                gathered[mine] = unpack_rows(
                    part.packed, part.layout, part.encoding, indices[mine] - place, signed=part.signed
                )
        return torch.from_numpy(gathered)

    def _multiply(self, x: torch.Tensor, y: torch.Tensor, first_row: int, precision: Precision) -> None:
        if x.dtype != torch.float32 or x.stride(1) != 1:
            x = x.to(torch.float32).contiguous()
        row_bytes = 4 * self._width
        base = y.data_ptr() + first_row * row_bytes
        for part, place in zip(self._parts, self._places, strict=True):
            part.multiply(x, base + 4 * place, row_bytes, precision)


def load_affine_linear(
    checkpoint: Checkpoint,
    names: Sequence[str],
    *,
    prefill: Precision,
    read: Callable[[int], None] = lambda num_bytes: None,
) -> CpuAffineLinear:
    """The affine tensors `names` [rows_i, columns], one after another, read in pieces by torch's number of threads and
    packed as they come. `read` is called with bytes of the file read since. Raises BadCheckpoint."""
    parts = [_load_matrix(checkpoint, run, kept, read) for run, kept in _matrix_groups(checkpoint, names)]
    return CpuAffineLinear(parts, prefill)


def _matrix_groups(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[tuple[list[str], ScaleEncoding]]:
    """Names that can be one matrix: same bits, group and offset, whole tiles but for the last. Its exponent suits the
    one with the largest numbers."""
    lanes = matrix_kernels().target.lanes
    run: list[tuple[str, ScaleEncoding]] = []
    key: tuple[int, int, int] | None = None
    for name in names:
        info = checkpoint.tensors[name]
        assert info.affine is not None, name
        bits = stored_bits(info.affine)
        kept = choose_encoding(checkpoint.read_affine(name, 0, min(_SAMPLE_ROWS, info.shape[0])), bits)
        mine = (bits, info.affine.group, kept.offset)
        if run and (mine != key or checkpoint.tensors[run[-1][0]].shape[0] % lanes):
            yield _shared_encoding(run)
            run = []
        key = mine
        run.append((name, kept))
    yield _shared_encoding(run)


def _shared_encoding(run: Sequence[tuple[str, ScaleEncoding]]) -> tuple[list[str], ScaleEncoding]:
    exponent = min(kept.exponent for _, kept in run)
    return [name for name, _ in run], ScaleEncoding(offset=run[0][1].offset, exponent=exponent)


def _load_matrix(
    checkpoint: Checkpoint, names: Sequence[str], encoding: ScaleEncoding, read: Callable[[int], None]
) -> PackedMatrix:
    target = matrix_kernels().target
    infos = [checkpoint.tensors[name] for name in names]
    form = infos[0].affine
    assert form is not None
    layout = TileLayout(
        rows=sum(info.shape[0] for info in infos),
        columns=infos[0].shape[1],
        bits=stored_bits(form),
        group=form.group,
        lanes=target.lanes,
    )
    packed = empty_aligned(layout.num_bytes).reshape(layout.num_tiles, layout.tile_bytes)
    step = max(1, _PIECE_WEIGHTS // layout.columns // target.lanes) * target.lanes
    row_blocks = []
    tile = 0
    for name, info in zip(names, infos, strict=True):
        for first in range(0, info.shape[0], step):
            count = min(step, info.shape[0] - first)
            tiles = -(-count // target.lanes)
            row_blocks.append((name, first, count, packed[tile : tile + tiles]))
            tile += tiles

    def load(piece: tuple[str, int, int, np.ndarray]) -> int:
        name, first, count, out = piece
        rows = checkpoint.read_affine(name, first, count)
        pack_rows(name, rows, layout, encoding, out, signed=target.signed)
        info = checkpoint.tensors[name]
        return info.file_bytes * count // info.shape[0]

    if torch.get_num_threads() == 1 or len(row_blocks) == 1:
        for piece in row_blocks:
            read(load(piece))
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for num_bytes in pool.map(load, row_blocks):
                read(num_bytes)
    return PackedMatrix(layout, encoding, packed)
