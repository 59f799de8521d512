"""Attention of a lean layer: all tokens are projected at once, then each run attends over its own KV."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shard.torch_backend.attention import attend
from shard.torch_backend.lean.config import LayerFacts, LeanConfig
from shard.torch_backend.lean.native_attention import native_attention
from shard.torch_backend.lean.ops import Norm, rms_norm, rotate_
from shard.torch_backend.lean.step import LeanStep
from shard.torch_backend.linear import Linear


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
    """One layer's attention. KV is held in `kv_dtype`; the rest is computed in the dtype of what comes in."""

    def __init__(
        self,
        weights: AttentionWeights,
        config: LeanConfig,
        facts: LayerFacts,
        index: int,
        kv_dtype: torch.dtype,
        *,
        on_cpu: bool,
    ) -> None:
        self._weights = weights
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._scale = config.attention_scale
        self._softcap = config.attention_softcap
        self._facts = facts
        self._index = index
        self._kv_dtype = kv_dtype
        self._native = native_attention(config, facts, index, kv_dtype, weights.qk_norm) if on_cpu else None

    def __call__(self, x: torch.Tensor, step: LeanStep) -> torch.Tensor:
        """x [tokens, hidden] → [tokens, hidden]; appends the tokens' keys and values to their sequences."""
        weights = self._weights
        qkv = weights.qkv(x, step.num_decode)
        if weights.qkv_bias is not None:
            qkv.add_(weights.qkv_bias)
        if weights.q_norm is not None and weights.k_norm is not None:
            queries, rest = self._heads * self._head_dim, (self._heads + self._kv_heads) * self._head_dim
            qkv[:, :queries] = rms_norm(qkv[:, :queries], weights.q_norm)
            qkv[:, queries:rest] = rms_norm(qkv[:, queries:rest], weights.k_norm)
        num_native = 0 if self._native is None else step.num_decode
        parts = []
        if self._native is not None and num_native:
            parts.append(self._native(qkv, step))
        if num_native < qkv.shape[0]:
            parts.append(self._attend(self._positioned(qkv[num_native:], step, num_native), step, num_native))
        attended = parts[0] if len(parts) == 1 else torch.cat([part.to(x.dtype) for part in parts])
        output = weights.output(attended.to(x.dtype), step.num_decode)
        return output if weights.output_bias is None else output.add_(weights.output_bias)

    def _positioned(self, qkv: torch.Tensor, step: LeanStep, first: int) -> torch.Tensor:
        """qkv [tokens, (heads + 2 · kv_heads) · head_dim] of the rows from `first`, normed and turned in place →
        [tokens, heads + 2 · kv_heads, head_dim] in the KV's dtype."""
        num_turned = self._heads + self._kv_heads
        split = qkv.view(qkv.shape[0], num_turned + self._kv_heads, self._head_dim)
        turned = split[:, :num_turned]
        weights = self._weights
        if weights.qk_norm is not None:
            turned.copy_(rms_norm(turned, weights.qk_norm))
        if self._facts.rope is not None:
            cos, sin = step.angles(self._facts.rope)
            rotate_(turned, cos[first:], sin[first:])
        return split.to(self._kv_dtype)

    def _attend(self, qkv: torch.Tensor, step: LeanStep, first_row: int) -> torch.Tensor:
        """[tokens, heads + 2 · kv_heads, head_dim] of the rows from `first_row` → [tokens, heads · head_dim]."""
        window = self._facts.window
        queries, keys, values = qkv.transpose(0, 1).split_with_sizes((self._heads, self._kv_heads, self._kv_heads))
        runs = [run for run in step.ragged.runs if run.offset >= first_row]
        outputs = []
        for run in runs:
            whole = len(runs) == 1
            begin = run.offset - first_row
            span = slice(begin, begin + run.num_tokens)
            held_keys, held_values, first = run.kv.layer(self._index, window).append(
                run.start, keys if whole else keys[:, span], values if whole else values[:, span]
            )
            attended = attend(
                queries if whole else queries[:, span],
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
            outputs.append(attended.transpose(0, 1))
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return packed.reshape(qkv.shape[0], self._heads * self._head_dim)
