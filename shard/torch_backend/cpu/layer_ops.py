"""A decode step's operations between projections on the CPU: one native call each, on float32 rows."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from llvmlite import ir

from shard.torch_backend.cpu.compile import CompiledModule, KernelFields, new_fields
from shard.torch_backend.cpu.decode_attention_kernel import FIELDS as ATTEND_FIELDS
from shard.torch_backend.cpu.decode_attention_kernel import ROW_FIELDS, scratch_bytes, write_decode_attention
from shard.torch_backend.cpu.heads import AttentionShape
from shard.torch_backend.cpu.program import Program, Scratch
from shard.torch_backend.cpu.rowwise_kernels import GATED_FIELDS, NORM_FIELDS, write_gated, write_norm
from shard.torch_backend.cpu.vector_math import WIDTH

Activation = Literal["silu", "gelu"]

_MIN_TEAM_WORK = 1 << 16
"""Positions times features in a call from which on a team is worth waking."""

_SCRATCH = Scratch()


@cache
def _rowwise() -> CompiledModule:
    module = ir.Module("rowwise")
    write_norm(module)
    for activation in ("silu", "gelu"):
        write_gated(module, activation)
    return CompiledModule(module)


@cache
def _attend(shape: AttentionShape) -> CompiledModule:
    module = ir.Module("attend")
    write_decode_attention(module, shape)
    return CompiledModule(module)


def is_whole_vectors(width: int) -> bool:
    """Whether rows of `width` can go through these kernels."""
    return width % WIDTH == 0


class CpuRmsNorm:
    """x · weight / √(mean(x²) + eps) over rows, weight float32 [width]."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight.contiguous()  # Kept: the kernel knows its address.
        self._run = _rowwise().run("norm")
        self._fields, self._address = new_fields(len(NORM_FIELDS))
        self._fields[2] = self._weight.data_ptr()
        self._fields[5] = weight.shape[0]
        self._fields[6] = struct.unpack("<q", struct.pack("<d", eps))[0]

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, width] float32, contiguous → the same shape. With `added`, it is first added to x, in place."""
        y = torch.empty_like(x)
        fields = self._fields
        fields[0] = x.data_ptr()
        fields[1] = 0 if added is None else added.data_ptr()
        fields[3] = y.data_ptr()
        fields[4] = x.shape[0]
        self._run(self._address)
        return y

    def add_to(self, program: Program, kind: str, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Put the norm of what x, and `added`, will hold into a program → where it will be, in the buffer of that
        kind."""
        y = program.rows(kind, *x.shape)
        fields, address = new_fields(len(NORM_FIELDS))
        fields[:] = list(self._fields)
        fields[0] = x.data_ptr()
        fields[1] = 0 if added is None else added.data_ptr()
        fields[3] = y.data_ptr()
        fields[4] = x.shape[0]
        program.keep(self)
        program.counts_rows(fields, 4)
        program.call(_rowwise().address("norm"), (fields, address))
        return y


class CpuGatedActivation:
    """activation(gate) · up for rows [gate | up]."""

    def __init__(self, activation: Activation) -> None:
        self._name = f"gated_{activation}"
        self._run = _rowwise().run(self._name)
        self._fields, self._address = new_fields(len(GATED_FIELDS))

    def supports(self, gate_up: torch.Tensor) -> bool:
        return gate_up.dtype == torch.float32 and gate_up.stride(1) == 1 and self.supports_width(gate_up.shape[1])

    def supports_width(self, both: int) -> bool:
        """Whether rows of gate and up together can be so wide."""
        return both % (2 * WIDTH) == 0

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [rows, 2 · width] float32 → [rows, width]."""
        rows, both = gate_up.shape
        y = torch.empty((rows, both // 2), dtype=torch.float32)
        fields = self._fields
        fields[0] = gate_up.data_ptr()
        fields[1] = y.data_ptr()
        fields[2] = rows
        fields[3] = both // 2
        fields[4] = gate_up.stride(0) * 4
        self._run(self._address)
        return y

    def add_to(self, program: Program, gate_up: torch.Tensor) -> torch.Tensor:
        """Put the gate of what `gate_up` will hold into a program → where it will be."""
        rows, both = gate_up.shape
        y = program.rows("gated", rows, both // 2)
        fields, address = new_fields(len(GATED_FIELDS))
        fields[:] = [gate_up.data_ptr(), y.data_ptr(), rows, both // 2, gate_up.stride(0) * 4]
        program.keep(self)
        program.counts_rows(fields, 2)
        program.call(_rowwise().address(self._name), (fields, address))
        return y


KVSlot = tuple[int, int, int, int]
"""A token's place in its KV: addresses of the first visible key and value, bytes between heads, positions."""


class DecodeAttention:
    """Attention of decode tokens in one layer. `q_norm` and `k_norm` [head_dim] float32 where the shape has an eps."""

    def __init__(self, shape: AttentionShape, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None) -> None:
        self._shape = shape
        self._norms = (q_norm, k_norm)  # Kept: the kernel knows their addresses.
        compiled = _attend(shape)
        self._alone, self._team = compiled.run("attend"), compiled.team_run("attend_team")
        self._fields, self._address = new_fields(len(ATTEND_FIELDS))
        for position, norm in ((4, q_norm), (5, k_norm)):
            self._fields[position] = 0 if norm is None else norm.data_ptr()

    def __call__(
        self, qkv: torch.Tensor, slots: Sequence[KVSlot], angles: Sequence[tuple[int, int]], threads: int
    ) -> torch.Tensor:
        """qkv [rows, (heads + 2 · kv_heads) · head_dim] float32; for each row its seat and the addresses of its cosines
        and sines, [rotary / 2] float32 each → [rows, heads · head_dim] float32. Writes the rows' keys and values."""
        shape, fields = self._shape, self._fields
        rows = len(slots)
        table, table_address = new_fields(len(ROW_FIELDS) * rows)
        longest = 0
        at = 0
        for slot, angle in zip(slots, angles, strict=True):
            table[at : at + 6] = [*slot, *angle]
            longest = max(longest, slot[3])
            at += 6
        task_bytes = scratch_bytes(shape, longest)
        tasks = rows * shape.kv_heads
        fields[2] = _SCRATCH.reserve(task_bytes * threads)
        out = torch.empty((rows, shape.heads * shape.head_dim), dtype=torch.float32)
        fields[0] = qkv.data_ptr()
        fields[1] = out.data_ptr()
        fields[3] = table_address
        fields[6] = qkv.stride(0) * 4
        fields[7] = tasks
        fields[8] = task_bytes
        is_small = longest * tasks * shape.queries * shape.head_dim < _MIN_TEAM_WORK
        if self._team is None or is_small or threads == 1:
            self._alone(self._address)
        else:
            self._team(self._address, threads)
        return out

    def add_to(self, program: Program, qkv: torch.Tensor, threads: int) -> tuple[torch.Tensor, DecodeKVSlots]:
        """Put the attention of what `qkv` will hold into a program → where it will be, and what to set before each
        run."""
        shape, rows = self._shape, qkv.shape[0]
        out = program.rows("attended", rows, shape.heads * shape.head_dim)
        fields, address = new_fields(len(ATTEND_FIELDS))
        fields[:] = list(self._fields)
        table, table_address = new_fields(len(ROW_FIELDS) * rows)
        fields[0] = qkv.data_ptr()
        fields[1] = out.data_ptr()
        fields[3] = table_address
        fields[6] = qkv.stride(0) * 4
        fields[7] = rows * shape.kv_heads
        compiled = _attend(shape)
        program.keep(self, table, compiled)
        team = threads > 1 and compiled.has_teams
        program.call(compiled.address("attend_team" if team else "attend"), (fields, address), threads if team else 1)
        return out, DecodeKVSlots(shape, fields, table)


class DecodeKVSlots:
    """What changes from step to step in a program's call of attention."""

    def __init__(self, shape: AttentionShape, fields: KernelFields, table: KernelFields) -> None:
        self._shape, self._fields, self._table = shape, fields, table

    def scratch_bytes(self, positions: int) -> int:
        """What each thread works in, if no token sees more than `positions`."""
        return scratch_bytes(self._shape, positions)

    def set(
        self, slots: Sequence[KVSlot], angles: Sequence[tuple[int, int]], scratch: int, scratch_thread_bytes: int
    ) -> None:
        """Seats and angles as for `DecodeAttention`; the address of every thread's scratch."""
        at = 0
        for slot, angle in zip(slots, angles, strict=True):
            self._table[at : at + 6] = [*slot, *angle]
            at += 6
        self._fields[2] = scratch
        self._fields[8] = scratch_thread_bytes
