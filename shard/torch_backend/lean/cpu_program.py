"""A decode step's layers on the CPU as one native call: the same kernels in the same order, without Python in between.

For models whose layers are all of native parts: quantized projections without biases, norms, gates, attention. Every
number is the one that the layers, called one by one, give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shard.torch_backend.lean.layer import GatedMlp, Layer
from shard.torch_backend.lean.ops import Norm
from shard.torch_backend.lean.step import LeanStep
from shard.torch_backend.linear import Linear

if TYPE_CHECKING:
    from shard.torch_backend.cpu.layer_ops import AttentionSeats, Gate, RowNorm
    from shard.torch_backend.cpu.linear import CpuAffineLinear
    from shard.torch_backend.lean.native_attention import NativeDecode

MOST_ROWS = 16
_KEPT = 8
"""Programs at once: each has buffers for its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLayer:
    """A layer's native parts."""

    before_attention: RowNorm
    qkv: CpuAffineLinear
    attention: NativeDecode
    output: CpuAffineLinear
    after_attention: RowNorm | None
    before_mlp: RowNorm
    gate_up: CpuAffineLinear
    gate: Gate
    down: CpuAffineLinear
    after_mlp: RowNorm | None


class LayersProgram:
    """Layers for decode steps of a fixed number of rows, on a fixed number of threads."""

    def __init__(self, layers: Sequence[NativeLayer], hidden_size: int, rows: int, threads: int) -> None:
        from shard.torch_backend.cpu.program import Program
        from shard.torch_backend.cpu.scratch import Scratch

        self._layers = layers
        self._threads = threads
        self._scratch = Scratch()
        self._program = Program()
        self._x = self._program.rows("x", rows, hidden_size)
        self._seats: list[AttentionSeats] = []
        self._added: torch.Tensor | None = None
        for layer in layers:
            self._put(layer)

    def run(self, x: torch.Tensor, step: LeanStep) -> torch.Tensor:
        """x [rows, hidden] float32 → the residual stream after all layers, a tensor of its own. Appends the rows' keys
        and values to their sequences."""
        thread_bytes = self._seats[0].scratch_bytes(max(run.start for run in step.ragged.runs) + 1)
        scratch = self._scratch.reserve(thread_bytes * self._threads)
        for layer, seats in zip(self._layers, self._seats, strict=True):
            places, angles = layer.attention.places(step)
            seats.set(places, angles, scratch, thread_bytes)
        self._x.copy_(x)
        self._program.run()
        assert self._added is not None
        return self._x + self._added

    def _put(self, layer: NativeLayer) -> None:
        program, threads = self._program, self._threads
        normed = layer.before_attention.into(program, "normed", self._x, self._added)
        attended, seats = layer.attention.into(program, layer.qkv.into(program, "qkv", normed, threads), threads)
        self._seats.append(seats)
        added = layer.output.into(program, "added", attended, threads)
        if layer.after_attention is not None:
            added = layer.after_attention.into(program, "added, normed", added)
        normed = layer.before_mlp.into(program, "normed", self._x, added)
        gated = layer.gate.into(program, layer.gate_up.into(program, "gate_up", normed, threads))
        self._added = layer.down.into(program, "added", gated, threads)
        if layer.after_mlp is not None:
            self._added = layer.after_mlp.into(program, "added, normed", self._added)


class CpuPrograms:
    """The programs of a stage, made when a step first has so many rows."""

    def __init__(self, layers: Sequence[NativeLayer], hidden_size: int) -> None:
        self._layers = layers
        self._hidden_size = hidden_size
        self._made: dict[tuple[int, int], LayersProgram] = {}

    def of(self, rows: int) -> LayersProgram | None:
        """None for more rows than programs are made for."""
        if rows > MOST_ROWS:
            return None
        key = (rows, torch.get_num_threads())
        found = self._made.pop(key, None) or LayersProgram(self._layers, self._hidden_size, *key)
        self._made[key] = found  # The last used comes last.
        if len(self._made) > _KEPT:
            del self._made[next(iter(self._made))]
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
    attention, gate = layer.attention.native_decode, mlp.gate.native
    before_attention, before_mlp = _native(norms.before_attention), _native(norms.before_mlp)
    after_attention, after_mlp = _native(norms.after_attention), _native(norms.after_mlp)
    qkv, output, gate_up, down = map(_affine, (weights.qkv, weights.output, mlp.gate_up, mlp.down))
    if attention is None or gate is None or before_attention is None or before_mlp is None:
        return None
    if (after_attention is None) != (norms.after_attention is None) or (after_mlp is None) != (norms.after_mlp is None):
        return None
    if qkv is None or output is None or gate_up is None or down is None or not gate.takes_width(gate_up.out):
        return None
    return NativeLayer(
        before_attention=before_attention,
        qkv=qkv,
        attention=attention,
        output=output,
        after_attention=after_attention,
        before_mlp=before_mlp,
        gate_up=gate_up,
        gate=gate,
        down=down,
        after_mlp=after_mlp,
    )


def _native(norm: Norm | None) -> RowNorm | None:
    return None if norm is None else norm.native


def _affine(linear: Linear) -> CpuAffineLinear | None:
    from shard.torch_backend.cpu.linear import CpuAffineLinear

    return linear if isinstance(linear, CpuAffineLinear) else None
