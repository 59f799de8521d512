"""Attention of a fused layer: all tokens are projected at once, then each run attends, by native kernels if any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shard.torch_backend.attention import AttentionRules, Run, attend
from shard.torch_backend.fused.config import FusedConfig, LayerFacts
from shard.torch_backend.fused.ops import RmsNorm, apply_rope_, decode_attention, rms_norm
from shard.torch_backend.fused.step import FusedStep, PrefillSlice
from shard.torch_backend.linear import Linear
from shard.torch_backend.tensors import TORCH_DTYPES
from transport.errors import UnsupportedModel
from transport.messages.ring import DType, KVForm

if TYPE_CHECKING:
    from shard.torch_backend.cpu.decode_attention import DecodeAttention, DecodeKVSlots, KVSlot
    from shard.torch_backend.cpu.prefill_attention import PrefillAttention, PrefillKVSlots, SlotMapping
    from shard.torch_backend.cpu.program import Program


class NativeDecode:
    """One layer's attention for the rows [0, num_decode) of a step."""

    def __init__(self, attention: DecodeAttention, facts: LayerFacts, index: int, like: torch.Tensor) -> None:
        self._attention = attention
        self._facts = facts
        self._index = index
        self._like = like

    def __call__(self, qkv: torch.Tensor, step: FusedStep) -> torch.Tensor:
        """qkv [rows, (heads + 2 · kv_heads) · head_dim] float32, before norms of heads and rotary embedding →
        [num_decode, heads · head_dim] float32."""
        slots, angles = self.slots_and_angles(step)
        return self._attention(qkv, slots, angles, torch.get_num_threads())

    def slots_and_angles(self, step: FusedStep) -> tuple[Sequence[KVSlot], Sequence[tuple[int, int]]]:
        """Of the decode rows: room in their KV, and where their angles are."""
        window, like, index = self._facts.window, self._like, self._index
        slots = [run.kv.layer(index, window).kv_slot(run.start, like) for run in step.ragged.runs[: step.num_decode]]
        return slots, step.angle_addresses(self._facts.rope)

    def add_to(self, program: Program, qkv: torch.Tensor, threads: int) -> tuple[torch.Tensor, DecodeKVSlots]:
        """As `DecodeAttention.into`."""
        return self._attention.add_to(program, qkv, threads)


class NativePrefill:
    """One layer's attention for rows of prompts."""

    def __init__(self, attention: PrefillAttention, facts: LayerFacts, index: int, like: torch.Tensor) -> None:
        self._attention = attention
        self._facts = facts
        self._index = index
        self._like = like

    def __call__(self, qkv: torch.Tensor, step: FusedStep, prefill: PrefillSlice) -> torch.Tensor:
        """qkv [piece rows, (heads + 2 · kv_heads) · head_dim] float32, before norms of heads and rotary embedding →
        [piece rows, heads · head_dim] float32."""
        slots, angles = self.slots_and_angles(step, prefill)
        return self._attention(qkv, slots, angles, torch.get_num_threads())

    def slots_and_angles(self, step: FusedStep, prefill: PrefillSlice) -> tuple[Sequence[SlotMapping], tuple[int, int]]:
        """Of the piece's runs: room in their KV; and where the angles of its first row are."""
        window, like, index = self._facts.window, self._like, self._index
        slots: list[SlotMapping] = []
        for run in prefill.runs:
            slot = run.kv.layer(index, window).slot_mapping(run.start, run.num_tokens, like)
            slots.append((run.offset - prefill.first, run.num_tokens, *slot, run.start))
        return slots, step.angle_address(self._facts.rope, prefill.first)

    def add_to(self, program: Program, qkv: torch.Tensor, threads: int) -> tuple[torch.Tensor, PrefillKVSlots]:
        """As `PrefillAttention.into`."""
        return self._attention.add_to(program, qkv, threads)


def native_attention(
    config: FusedConfig, facts: LayerFacts, index: int, compute_dtype: DType, kv: KVForm, qk_norm: RmsNorm | None
) -> tuple[NativeDecode | None, NativePrefill | None]:
    """None where the kernels have no such attention: heads of an odd size, float16 on an old processor. Raises
    UnsupportedModel there if KV is to be held in 8 bits, which nothing else can."""
    from shard.torch_backend.cpu.compile import host_has_float16
    from shard.torch_backend.cpu.decode_attention import DecodeAttention
    from shard.torch_backend.cpu.heads import AttentionShape
    from shard.torch_backend.cpu.prefill_attention import PrefillAttention, best_products

    rotary = 0 if facts.rope is None else 2 * config.ropes[facts.rope].inverse_frequencies.shape[0]
    shape = AttentionShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary=rotary,
        kv_dtype=compute_dtype if kv == "full" else "int8",
        scale=config.attention_scale,
        eps=None if qk_norm is None else config.norm_eps,
        softcap=config.attention_softcap,
    )
    products = best_products(shape, exact=compute_dtype == "float32")
    if kv == "8-bit" and (products is None or not shape.is_supported()):
        raise UnsupportedModel(
            f"KV can't be held in 8 bits: the CPU has no such attention for heads of {config.head_dim} features",
            hint="leave --kv-cache out",
        )
    if not shape.is_supported() or (shape.kv_dtype == "float16" and not host_has_float16()):
        return None, None
    norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if qk_norm is not None:
        norms = (qk_norm.weight[0].contiguous(), qk_norm.weight[config.num_heads].contiguous())
    like = torch.empty((config.num_kv_heads, 1, config.head_dim), dtype=TORCH_DTYPES[compute_dtype])
    if kv == "8-bit":
        like = torch.empty((config.num_kv_heads, 1, shape.kv_row_bytes), dtype=torch.int8)
    decode = NativeDecode(DecodeAttention(shape, *norms), facts, index, like)
    if products is None:
        return decode, None
    return decode, NativePrefill(PrefillAttention(shape, products, facts.window, *norms), facts, index, like)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """qkv: the rows of queries, keys and values, one after another. Norms of queries and keys: over each head
    (`qk_norm`, weights [heads + kv_heads, head_dim]) or over all heads (`q_norm`, `k_norm`)."""

    qkv: Linear
    qkv_bias: torch.Tensor | None
    output: Linear
    output_bias: torch.Tensor | None
    qk_norm: RmsNorm | None
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None


class Attention:
    """One layer's attention. KV is held in the compute dtype, or as `kv` says; the rest is computed in the dtype of
    what comes in."""

    def __init__(
        self,
        weights: AttentionWeights,
        config: FusedConfig,
        facts: LayerFacts,
        index: int,
        compute_dtype: DType,
        kv: KVForm,
        *,
        on_cpu: bool,
    ) -> None:
        self.weights = weights
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._scale = config.attention_scale
        self._softcap = config.attention_softcap
        self._facts = facts
        self._index = index
        self._kv_dtype = TORCH_DTYPES[compute_dtype]
        self.native_decode: NativeDecode | None = None
        self.native_prefill: NativePrefill | None = None
        if on_cpu:
            found = native_attention(config, facts, index, compute_dtype, kv, weights.qk_norm)
            self.native_decode, self.native_prefill = found

    def __call__(self, x: torch.Tensor, step: FusedStep) -> torch.Tensor:
        """x [tokens, hidden] → [tokens, hidden]; appends the tokens' keys and values to their sequences."""
        weights = self.weights
        qkv = weights.qkv(x, step.num_decode)
        if weights.qkv_bias is not None:
            qkv.add_(weights.qkv_bias)
        if weights.q_norm is not None and weights.k_norm is not None:
            # Contiguous also where there are several rows: one row alone must not take another kernel.
            queries, rest = self._heads * self._head_dim, (self._heads + self._kv_heads) * self._head_dim
            qkv[:, :queries] = rms_norm(qkv[:, :queries].contiguous(), weights.q_norm)
            qkv[:, queries:rest] = rms_norm(qkv[:, queries:rest].contiguous(), weights.k_norm)
        attended = self._attend(qkv, step)
        if attended.dtype != x.dtype:
            attended = attended.to(x.dtype)
        output = weights.output(attended, step.num_decode)
        return output if weights.output_bias is None else output.add_(weights.output_bias)

    def _attend(self, qkv: torch.Tensor, step: FusedStep) -> torch.Tensor:
        """[tokens, (heads + 2 · kv_heads) · head_dim] → [tokens, heads · head_dim]; decode rows first."""
        num_rows, num_decode = qkv.shape[0], step.num_decode
        if self.native_decode is not None and num_decode == num_rows:
            return self.native_decode(qkv, step)
        outputs = []
        done = 0  # Rows, which are as many runs: decode runs have one each.
        if self.native_decode is not None and num_decode:
            outputs.append(self.native_decode(qkv, step))
            done = num_decode
        if self.native_prefill is not None:  # and then decode is native, too
            for prefill in step.slices:
                outputs.append(
                    self.native_prefill(qkv[prefill.first : prefill.first + prefill.num_rows], step, prefill)
                )
        else:
            self._norm_and_rotate(qkv[done:], step, done)
            if self._softcap is None and done < num_decode:
                outputs += self._decode(qkv[:num_decode], step)
                done = num_decode
            outputs += [self._prefill(qkv, run, step) for run in step.ragged.runs[done:]]
        width = self._heads * self._head_dim
        flat = [output.reshape(-1, width) for output in outputs]
        if len(flat) == 1:
            return flat[0]
        return torch.cat([rows.to(flat[-1].dtype) for rows in flat])

    def _norm_and_rotate(self, qkv: torch.Tensor, step: FusedStep, first: int) -> None:
        """Norm and turn the queries and keys of qkv [tokens, (heads + 2 · kv_heads) · head_dim], the step's rows from
        `first`, in place."""
        weights = self.weights
        num_rotated = self._heads + self._kv_heads
        rotated = qkv.view(qkv.shape[0], num_rotated + self._kv_heads, self._head_dim)[:, :num_rotated]
        if weights.qk_norm is not None:
            rotated.copy_(rms_norm(rotated, weights.qk_norm))
        if self._facts.rope is not None:
            cos, sin = step.angles(self._facts.rope).pairs()
            apply_rope_(rotated, cos[first:], sin[first:])

    def _decode(self, qkv: torch.Tensor, step: FusedStep) -> list[torch.Tensor]:
        """Rows of decode entries, turned → each one's [1, kv_heads, heads / kv_heads, head_dim]."""
        qkv = qkv.to(self._kv_dtype)
        num_rows, kv_heads = qkv.shape[0], self._kv_heads
        queries, new = qkv.split_with_sizes((self._heads * self._head_dim, 2 * kv_heads * self._head_dim), dim=1)
        # The heads of a group become the rows of one small matrix: they look at the same keys.
        grouped = queries.view(num_rows, 1, kv_heads, -1, self._head_dim).unbind()
        appended = new.view(num_rows, 2, kv_heads, self._head_dim).unbind()
        outputs = []
        for run, query, both in zip(step.ragged.runs, grouped, appended, strict=False):
            keys, values = run.kv.layer(self._index, self._facts.window).append_one(run.start, both)
            outputs.append(decode_attention(query, keys, values, self._scale))
        return outputs

    def _prefill(self, qkv: torch.Tensor, run: Run, step: FusedStep) -> torch.Tensor:
        """A run's rows of qkv, turned → [tokens, heads · head_dim] or [tokens, heads, head_dim]."""
        rows = qkv[run.offset : run.offset + run.num_tokens].view(run.num_tokens, -1, self._head_dim)
        rows = rows.to(self._kv_dtype)
        queries, keys, values = rows.transpose(0, 1).split_with_sizes((self._heads, self._kv_heads, self._kv_heads))
        window = self._facts.window
        held_keys, held_values, first = run.kv.layer(self._index, window).append(run.start, keys, values)
        attended = attend(
            queries,
            held_keys,
            held_values,
            run,
            first,
            step.ragged,
            AttentionRules(window, self._scale, self._softcap, sinks=None),
        )
        return attended.transpose(0, 1)
