"""Prompts' attention on the CPU: one native call for all runs of a slice of the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from llvmlite import ir

from shard.torch_backend.cpu.compile import (
    CompiledModule,
    KernelFields,
    host_has_bfloat_dots,
    host_has_wide_vectors,
    new_fields,
)
from shard.torch_backend.cpu.heads import AttentionShape, BFloatProducts, FloatProducts, Products
from shard.torch_backend.cpu.prefill_attention_kernel import FIELDS, RUN_FIELDS, scratch_bytes, write_prefill_attention
from shard.torch_backend.cpu.program import Program, Scratch

MAX_RUNS = 16
"""Of one call."""
_BLOCK_ROWS = 96
"""Query rows of a task that share a transposed key: enough for that to cost a twentieth."""

_SCRATCH = Scratch()
_INDEX = {name: position for position, name in enumerate(FIELDS)}
_COS, _SIN, _NUM_RUNS, _TASKS, _TOKENS = (_INDEX[name] for name in ("cos", "sin", "num_runs", "tasks", "block_tokens"))


SlotMapping = tuple[int, int, int, int, int, int, int]
"""`RUN_FIELDS` of a run."""


def best_products(shape: AttentionShape, *, exact: bool) -> Products | None:
    """Those of this machine for KV of that kind; float32 where all is to be `exact`. None where heads are of an odd
    size."""
    bfloats, floats = BFloatProducts(), FloatProducts()
    if not exact and bfloats.supports(shape) and host_has_bfloat_dots():
        return bfloats
    return floats if floats.supports(shape) else None


class PrefillAttention:
    """Attention of prompts' tokens in one layer, with what turns and norms their heads. `q_norm` and `k_norm`
    [head_dim] float32 where the shape has an eps; `window` None: a token sees all before."""

    def __init__(
        self,
        shape: AttentionShape,
        products: Products,
        window: int | None,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> None:
        self._shape = shape
        self._norms = (q_norm, k_norm)  # Kept: the kernel knows their addresses.
        self._compiled = _compiled(shape, type(products))
        self._alone = self._compiled.run("attend_chunk")
        self._team = self._compiled.team_run("attend_chunk_team")
        self._block_tokens = max(1, _BLOCK_ROWS // shape.queries)
        self._scratch_bytes = scratch_bytes(shape, products, self._block_tokens)
        self._fields, self._address = new_fields(len(FIELDS))
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            self._fields[_INDEX[name]] = 0 if norm is None else norm.data_ptr()
        self._fields[_INDEX["window"]] = window or 0
        self._fields[_INDEX["scratch_thread_bytes"]] = self._scratch_bytes

    def __call__(
        self, qkv: torch.Tensor, slots: Sequence[SlotMapping], angles: tuple[int, int], threads: int
    ) -> torch.Tensor:
        """qkv [rows, (heads + 2 · kv_heads) · head_dim] float32; where each run's rows belong; the addresses of row 0's
        cosines and sines, [rotary / 2] float32 a row → [rows, heads · head_dim] float32. Writes the rows' keys and
        values."""
        out = torch.empty((qkv.shape[0], self._shape.heads * self._shape.head_dim), dtype=torch.float32)
        fields = self._fields
        self._set_addresses(fields, qkv, out, _SCRATCH.reserve(self._scratch_bytes * threads))
        # Held until the call is over: the fields know where its table is.
        prefill_slots = PrefillKVSlots(fields, self._shape, self._block_tokens, threads)
        prefill_slots.set(slots, angles)
        if self._team is None or threads == 1:
            self._alone(self._address)
        else:
            self._team(self._address, threads)
        return out

    def add_to(self, program: Program, qkv: torch.Tensor, threads: int) -> tuple[torch.Tensor, PrefillKVSlots]:
        """Put the attention of what `qkv` will hold into a program → where it will be, and what to set before each
        run."""
        out = program.rows("attended", qkv.shape[0], self._shape.heads * self._shape.head_dim)
        fields, address = new_fields(len(FIELDS))
        fields[:] = list(self._fields)
        self._set_addresses(fields, qkv, out, program.scratch(self._scratch_bytes * threads))
        program.keep(self)
        team = threads > 1 and self._compiled.has_teams
        name = "attend_chunk_team" if team else "attend_chunk"
        program.call(self._compiled.address(name), (fields, address), threads if team else 1)
        return out, PrefillKVSlots(fields, self._shape, self._block_tokens, threads)

    def _set_addresses(self, fields: KernelFields, qkv: torch.Tensor, out: torch.Tensor, scratch: int) -> None:
        for name, value in (
            ("qkv", qkv.data_ptr()),
            ("out", out.data_ptr()),
            ("scratch", scratch),
            ("qkv_row_bytes", qkv.stride(0) * 4),
        ):
            fields[_INDEX[name]] = value


class PrefillKVSlots:
    """What changes from call to call: in these fields, and in a table of runs that they point to."""

    def __init__(self, fields: KernelFields, shape: AttentionShape, block_tokens: int, threads: int) -> None:
        self._fields = fields
        self._kv_heads = shape.kv_heads
        self._block_tokens, self._threads = block_tokens, threads
        self._runs, address = new_fields(MAX_RUNS * len(RUN_FIELDS))
        fields[_INDEX["runs"]] = address

    def set(self, slots: Sequence[SlotMapping], angles: tuple[int, int]) -> None:
        """As for `PrefillAttention`."""
        assert len(slots) <= MAX_RUNS, "the caller takes fewer runs at a time"
        tokens, heads = self._block_tokens, self._kv_heads
        if self._threads > 1:  # Two tasks for each, where there are tokens enough.
            tokens = max(1, min(tokens, sum(seat[1] for seat in slots) * heads // (2 * self._threads)))
        at, blocks = 0, 0
        for slot in slots:
            self._runs[at : at + len(RUN_FIELDS)] = list(slot)
            at += len(RUN_FIELDS)
            blocks += -(-slot[1] // tokens)
        fields = self._fields
        fields[_COS], fields[_SIN] = angles
        fields[_NUM_RUNS], fields[_TASKS], fields[_TOKENS] = len(slots), blocks * heads, tokens


@cache
def _compiled(shape: AttentionShape, products: type[Products]) -> CompiledModule:
    module = ir.Module("attend_chunk")
    write_prefill_attention(module, shape, products(), 8 if host_has_wide_vectors() else 4)
    return CompiledModule(module)
