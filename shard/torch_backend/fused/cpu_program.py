"""A step's layers on the CPU as native calls, one for its decode rows and one for each piece of prompts: the same
kernels in the same order, without Python in between.

For models whose layers are all of native parts: quantized projections without biases, norms, gates, attention. Every
number is the one that the layers, called one by one, give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from shard.torch_backend.fused.layer import GatedMlp, Layer
from shard.torch_backend.fused.ops import RmsNorm
from shard.torch_backend.fused.step import SLICE_TOKENS, FusedStep, PrefillSlice
from shard.torch_backend.linear import Linear

if TYPE_CHECKING:
    from shard.torch_backend.cpu.decode_attention import DecodeKVSlots
    from shard.torch_backend.cpu.linear import CpuAffineLinear
    from shard.torch_backend.cpu.norm_and_gate import CpuGatedActivation, CpuRmsNorm
    from shard.torch_backend.cpu.prefill_attention import PrefillKVSlots
    from shard.torch_backend.cpu.program import Program
    from shard.torch_backend.fused.attention import NativeDecode, NativePrefill

_P = TypeVar("_P", "DecodeProgram", "PrefillProgram")

MAX_DECODE_ROWS = 16
"""Of decode entries in a program."""
_SHORT_PREFILL_TOKENS = 15
"""Of prompts: a team quantizes more together."""
_MAX_PROGRAMS = 18
"""Programs at once: each has buffers for its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLayer:
    """A layer's native parts."""

    before_attention: CpuRmsNorm
    qkv: CpuAffineLinear
    decode: NativeDecode
    prefill: NativePrefill
    output: CpuAffineLinear
    after_attention: CpuRmsNorm | None
    before_mlp: CpuRmsNorm
    gate_up: CpuAffineLinear
    gate: CpuGatedActivation
    down: CpuAffineLinear
    after_mlp: CpuRmsNorm | None


class DecodeProgram:
    """Layers for decode steps of a fixed number of rows, on a fixed number of threads."""

    def __init__(self, layers: Sequence[NativeLayer], hidden_size: int, rows: int, threads: int) -> None:
        from shard.torch_backend.cpu.program import Scratch

        self._layers, self._threads = layers, threads
        self._scratch = Scratch()
        self._slots: list[DecodeKVSlots] = []
        self._calls = _LayerCalls(layers, hidden_size, rows, threads, is_decode=True, attend=self._attend)

    def run(self, x: torch.Tensor, step: FusedStep) -> None:
        """The residual stream x [rows, hidden] float32, of the step's decode rows → after all layers, in its place.
        Appends the rows' keys and values to their sequences."""
        runs = step.ragged.runs[: step.num_decode]
        thread_bytes = self._slots[0].scratch_bytes(max(run.start for run in runs) + 1)
        scratch = self._scratch.reserve(thread_bytes * self._threads)
        for layer, layer_slots in zip(self._layers, self._slots, strict=True):
            slots, angles = layer.decode.slots_and_angles(step)
            layer_slots.set(slots, angles, scratch, thread_bytes)
        self._calls.run(x)

    def _attend(self, layer: NativeLayer, program: Program, qkv: torch.Tensor) -> torch.Tensor:
        attended, slots = layer.decode.add_to(program, qkv, self._threads)
        self._slots.append(slots)
        return attended


class PrefillProgram:
    """Layers for pieces of prompts, of up to a number of rows."""

    def __init__(self, layers: Sequence[NativeLayer], hidden_size: int, rows: int, threads: int) -> None:
        self._layers, self._threads = layers, threads
        self._slots: list[PrefillKVSlots] = []
        self._calls = _LayerCalls(layers, hidden_size, rows, threads, is_decode=False, attend=self._attend)

    def run(self, x: torch.Tensor, step: FusedStep, prefill: PrefillSlice) -> None:
        """As `DecodeProgram.run`, x [rows, hidden] being the piece's rows."""
        for layer, slots in zip(self._layers, self._slots, strict=True):
            slots.set(*layer.prefill.slots_and_angles(step, prefill))
        self._calls.run(x)

    def _attend(self, layer: NativeLayer, program: Program, qkv: torch.Tensor) -> torch.Tensor:
        attended, slots = layer.prefill.add_to(program, qkv, self._threads)
        self._slots.append(slots)
        return attended


class _LayerCalls:
    """The calls of all layers, with buffers for so many rows. `attend` puts a layer's attention among them."""

    def __init__(
        self,
        layers: Sequence[NativeLayer],
        hidden_size: int,
        rows: int,
        threads: int,
        *,
        is_decode: bool,
        attend: Callable[[NativeLayer, Program, torch.Tensor], torch.Tensor],
    ) -> None:
        from shard.torch_backend.cpu.program import Program

        self._threads = threads
        self._is_decode = is_decode
        self._program = Program()
        self._x = self._program.rows("x", rows, hidden_size)
        self._added: torch.Tensor | None = None
        for layer in layers:
            self._add_layer(layer, attend)

    def run(self, x: torch.Tensor) -> None:
        """x [rows, hidden] float32, no more rows than there are buffers for → after all layers, in its place."""
        rows = x.shape[0]
        assert self._added is not None and rows <= self._x.shape[0]
        self._x[:rows].copy_(x)
        self._program.set_rows(rows)
        self._program.run()
        torch.add(self._x[:rows], self._added[:rows], out=x)

    def _add_layer(
        self, layer: NativeLayer, attend: Callable[[NativeLayer, Program, torch.Tensor], torch.Tensor]
    ) -> None:
        program = self._program

        def product(linear: CpuAffineLinear, kind: str, x: torch.Tensor) -> torch.Tensor:
            return linear.add_to(program, kind, x, self._threads, is_decode=self._is_decode)

        normed = layer.before_attention.add_to(program, "normed", self._x, self._added)
        attended = attend(layer, program, product(layer.qkv, "qkv", normed))
        added = product(layer.output, "added", attended)
        if layer.after_attention is not None:
            added = layer.after_attention.add_to(program, "added, normed", added)
        normed = layer.before_mlp.add_to(program, "normed", self._x, added)
        gated = layer.gate.add_to(program, product(layer.gate_up, "gate_up", normed))
        self._added = product(layer.down, "added", gated)
        if layer.after_mlp is not None:
            self._added = layer.after_mlp.add_to(program, "added, normed", self._added)


class CpuPrograms:
    """The programs of a stage, made when a step first has such rows."""

    def __init__(self, layers: Sequence[NativeLayer], hidden_size: int) -> None:
        self._layers = layers
        self._hidden_size = hidden_size
        self._made: dict[tuple[str, int, int], DecodeProgram | PrefillProgram] = {}

    def run(self, x: torch.Tensor, step: FusedStep) -> None:
        """The residual stream x [rows, hidden] float32 → after all layers, in its place: decode rows, no more than
        MOST_ROWS, by one program, the others piece by piece by another."""
        if step.num_decode:
            program = self._program_of(DecodeProgram, step.num_decode)
            program.run(x[: step.num_decode], step)
        for prefill in step.slices:
            size = _SHORT_PREFILL_TOKENS if prefill.num_rows <= _SHORT_PREFILL_TOKENS else SLICE_TOKENS
            self._program_of(PrefillProgram, size).run(
                x[prefill.first : prefill.first + prefill.num_rows], step, prefill
            )

    def _program_of(self, kind: type[_P], rows: int) -> _P:
        key = (kind.__name__, rows, torch.get_num_threads())
        found = self._made.pop(key, None) or kind(self._layers, self._hidden_size, *key[1:])
        self._made[key] = found  # The last used comes last.
        if len(self._made) > _MAX_PROGRAMS:
            del self._made[next(iter(self._made))]
        assert isinstance(found, kind)
        return found


def cpu_programs(layers: Sequence[Layer], hidden_size: int) -> CpuPrograms | None:
    """None where some part of a layer is not native."""
    found = [native for layer in layers if (native := _native_layer(layer)) is not None]
    return CpuPrograms(found, hidden_size) if len(found) == len(layers) else None


def _native_layer(layer: Layer) -> NativeLayer | None:
    norms, weights, mlp = layer.norms, layer.attention.weights, layer.mlp
    if layer.residual_multiplier != 1.0 or not isinstance(mlp, GatedMlp) or weights.q_norm is not None:
        return None
    if any(b is not None for b in (weights.qkv_bias, weights.output_bias, mlp.gate_up_bias, mlp.down_bias)):
        return None
    decode, prefill, gate = layer.attention.native_decode, layer.attention.native_prefill, mlp.gate.native
    before_attention, before_mlp = _native(norms.before_attention), _native(norms.before_mlp)
    after_attention, after_mlp = _native(norms.after_attention), _native(norms.after_mlp)
    qkv, output, gate_up, down = map(_affine, (weights.qkv, weights.output, mlp.gate_up, mlp.down))
    if decode is None or prefill is None or gate is None or before_attention is None or before_mlp is None:
        return None
    if (after_attention is None) != (norms.after_attention is None) or (after_mlp is None) != (norms.after_mlp is None):
        return None
    if qkv is None or output is None or gate_up is None or down is None or not gate.supports_width(gate_up.out):
        return None
    return NativeLayer(
        before_attention=before_attention,
        qkv=qkv,
        decode=decode,
        prefill=prefill,
        output=output,
        after_attention=after_attention,
        before_mlp=before_mlp,
        gate_up=gate_up,
        gate=gate,
        down=down,
        after_mlp=after_mlp,
    )


def _native(norm: RmsNorm | None) -> CpuRmsNorm | None:
    return None if norm is None else norm.native


def _affine(linear: Linear) -> CpuAffineLinear | None:
    from shard.torch_backend.cpu.linear import CpuAffineLinear

    return linear if isinstance(linear, CpuAffineLinear) else None
