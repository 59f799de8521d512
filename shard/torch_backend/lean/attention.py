"""Attention of a lean layer: all tokens are projected at once, then each run attends over its own KV."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shard.torch_backend.attention import Run, attend
from shard.torch_backend.dtypes import TORCH_DTYPES
from shard.torch_backend.lean.config import LayerFacts, LeanConfig
from shard.torch_backend.lean.native_attention import NativeChunk, NativeDecode, native_attention
from shard.torch_backend.lean.ops import Norm, decode_attention, rms_norm, rotate_
from shard.torch_backend.lean.step import LeanStep
from shard.torch_backend.linear import Linear
from transport.messages import DType, KVForm


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """qkv: the rows of queries, keys and values, one after another. Norms of queries and keys: over each head
    (`qk_norm`, weights [heads + kv_heads, head_dim]) or over all heads (`q_norm`, `k_norm`)."""

    qkv: Linear
    qkv_bias: torch.Tensor | None
    output: Linear
    output_bias: torch.Tensor | None
    qk_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None


class Attention:
    """One layer's attention. KV is held in the compute dtype, or as `kv` says; the rest is computed in the dtype of
    what comes in."""

    def __init__(
        self,
        weights: AttentionWeights,
        config: LeanConfig,
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
        self.native_chunk: NativeChunk | None = None
        if on_cpu:
            found = native_attention(config, facts, index, compute_dtype, kv, weights.qk_norm)
            self.native_decode, self.native_chunk = found

    def __call__(self, x: torch.Tensor, step: LeanStep) -> torch.Tensor:
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

    def _attend(self, qkv: torch.Tensor, step: LeanStep) -> torch.Tensor:
        """[tokens, (heads + 2 · kv_heads) · head_dim] → [tokens, heads · head_dim]; decode rows first."""
        num_rows, num_decode = qkv.shape[0], step.num_decode
        if self.native_decode is not None and num_decode == num_rows:
            return self.native_decode(qkv, step)
        outputs = []
        done = 0  # Rows, which are as many runs: decode runs have one each.
        if self.native_decode is not None and num_decode:
            outputs.append(self.native_decode(qkv, step))
            done = num_decode
        if self.native_chunk is not None:  # and then decode is native, too
            for piece in step.pieces:
                outputs.append(self.native_chunk(qkv[piece.first : piece.first + piece.num_rows], step, piece))
        else:
            self._position(qkv[done:], step, done)
            if self._softcap is None and done < num_decode:
                outputs += self._decode(qkv[:num_decode], step)
                done = num_decode
            outputs += [self._prefill(qkv, run, step) for run in step.ragged.runs[done:]]
        width = self._heads * self._head_dim
        flat = [output.reshape(-1, width) for output in outputs]
        if len(flat) == 1:
            return flat[0]
        return torch.cat([rows.to(flat[-1].dtype) for rows in flat])

    def _position(self, qkv: torch.Tensor, step: LeanStep, first: int) -> None:
        """Norm and turn the queries and keys of qkv [tokens, (heads + 2 · kv_heads) · head_dim], the step's rows from
        `first`, in place."""
        weights = self.weights
        num_turned = self._heads + self._kv_heads
        turned = qkv.view(qkv.shape[0], num_turned + self._kv_heads, self._head_dim)[:, :num_turned]
        if weights.qk_norm is not None:
            turned.copy_(rms_norm(turned, weights.qk_norm))
        if self._facts.rope is not None:
            cos, sin = step.angles(self._facts.rope).pairs()
            rotate_(turned, cos[first:], sin[first:])

    def _decode(self, qkv: torch.Tensor, step: LeanStep) -> list[torch.Tensor]:
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

    def _prefill(self, qkv: torch.Tensor, run: Run, step: LeanStep) -> torch.Tensor:
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
            window=window,
            scale=self._scale,
            softcap=self._softcap,
            sinks=None,
        )
        return attended.transpose(0, 1)
