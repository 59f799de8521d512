"""Quantized projections on the CPU: packed matrices, and the calls of their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from shard.checkpoint import Checkpoint
from shard.torch_backend.cpu.compile import empty_fields
from shard.torch_backend.cpu.matmul import BLOCK, FACTOR_BYTES, FIELDS, Precision, activation_bytes
from shard.torch_backend.cpu.matrix_kernels import matrix_kernels
from shard.torch_backend.cpu.packing import (
    Layout,
    Numbers,
    best_numbers,
    pack_rows,
    stored_bits,
    unpack_rows,
)
from shard.torch_backend.cpu.program import Program
from shard.torch_backend.cpu.scratch import Scratch, empty_aligned

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

    def __init__(self, layout: Layout, kept: Numbers, packed: np.ndarray) -> None:
        self.layout = layout
        self.kept = kept
        self.packed = packed
        kernels = matrix_kernels()
        target = kernels.target
        self._kernels = kernels
        self.signed = target.signed
        shift = 128 if target.signed and layout.bits == 8 else 0
        blocks = layout.columns // BLOCK
        at_once = _CACHED_ACTIVATION_BYTES // (2 * layout.columns) // _ROWS_STEP * _ROWS_STEP
        self._fields, self._address = empty_fields(len(FIELDS))
        for name, value in (
            ("weights", packed.ctypes.data),
            ("blocks", blocks),
            ("tiles", layout.num_tiles),
            ("rows_at_once", max(_ROWS_STEP, at_once)),
            ("group_blocks", layout.group // BLOCK),
            ("offset", kept.offset - shift),
            ("exponent", kept.exponent),
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

    def into(
        self, program: Program, x: torch.Tensor, y_address: int, y_row_bytes: int, threads: int, precision: Precision
    ) -> None:
        """Put the product of rows into a program: x float32 [rows, columns], contiguous."""
        layout = self.layout
        rows = x.shape[0]
        blocks = rows * layout.columns // BLOCK
        scratch = program.scratch(blocks * _BLOCK_BYTES)
        fields, address = empty_fields(len(FIELDS))
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
        self._kernels.kernel(layout.bits, precision).into(program, (fields, address), rows, threads)


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

    def into(self, program: Program, kind: str, x: torch.Tensor, threads: int, *, is_decode: bool) -> torch.Tensor:
        """Put x · Wᵀ into a program, for the rows [rows, columns] float32 that x will hold when it is run → where they
        will be, [rows, out] float32, in the buffer of that kind."""
        precision = 16 if is_decode else self._prefill
        y = program.rows(kind, x.shape[0], self._width)
        for part, place in zip(self._parts, self._places, strict=True):
            part.into(program, x, y.data_ptr() + 4 * place, 4 * self._width, threads, precision)
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
                    part.packed, part.layout, part.kept, indices[mine] - place, signed=part.signed
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
    parts = [_load_matrix(checkpoint, run, kept, read) for run, kept in _runs(checkpoint, names)]
    return CpuAffineLinear(parts, prefill)


def _runs(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[tuple[list[str], Numbers]]:
    """Names that can be one matrix: same bits, group and offset, whole tiles but for the last. Its exponent suits the
    one with the largest numbers."""
    lanes = matrix_kernels().target.lanes
    run: list[tuple[str, Numbers]] = []
    key: tuple[int, int, int] | None = None
    for name in names:
        info = checkpoint.tensors[name]
        assert info.affine is not None, name
        bits = stored_bits(info.affine)
        kept = best_numbers(checkpoint.read_affine(name, 0, min(_SAMPLE_ROWS, info.shape[0])), bits)
        mine = (bits, info.affine.group, kept.offset)
        if run and (mine != key or checkpoint.tensors[run[-1][0]].shape[0] % lanes):
            yield _together(run)
            run = []
        key = mine
        run.append((name, kept))
    yield _together(run)


def _together(run: Sequence[tuple[str, Numbers]]) -> tuple[list[str], Numbers]:
    exponent = min(kept.exponent for _, kept in run)
    return [name for name, _ in run], Numbers(offset=run[0][1].offset, exponent=exponent)


def _load_matrix(
    checkpoint: Checkpoint, names: Sequence[str], kept: Numbers, read: Callable[[int], None]
) -> PackedMatrix:
    target = matrix_kernels().target
    infos = [checkpoint.tensors[name] for name in names]
    form = infos[0].affine
    assert form is not None
    layout = Layout(
        rows=sum(info.shape[0] for info in infos),
        columns=infos[0].shape[1],
        bits=stored_bits(form),
        group=form.group,
        lanes=target.lanes,
    )
    packed = empty_aligned(layout.num_bytes).reshape(layout.num_tiles, layout.tile_bytes)
    step = max(1, _PIECE_WEIGHTS // layout.columns // target.lanes) * target.lanes
    pieces = []
    tile = 0
    for name, info in zip(names, infos, strict=True):
        for first in range(0, info.shape[0], step):
            count = min(step, info.shape[0] - first)
            tiles = -(-count // target.lanes)
            pieces.append((name, first, count, packed[tile : tile + tiles]))
            tile += tiles

    def load(piece: tuple[str, int, int, np.ndarray]) -> int:
        name, first, count, out = piece
        rows = checkpoint.read_affine(name, first, count)
        pack_rows(name, rows, layout, kept, out, signed=target.signed)
        info = checkpoint.tensors[name]
        return info.file_bytes * count // info.shape[0]

    if torch.get_num_threads() == 1 or len(pieces) == 1:
        for piece in pieces:
            read(load(piece))
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for num_bytes in pool.map(load, pieces):
                read(num_bytes)
    return PackedMatrix(layout, kept, packed)
