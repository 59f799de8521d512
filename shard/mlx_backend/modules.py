"""The modules of a stage, and what happens before its first layer and after its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from shard.mlx_backend.arrays import MLX_DTYPE
from transport.messages import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModules:
    """Modules of mlx-lm (untyped, so `Any`); `embed` is also the head where embeddings are tied and `head` is None."""

    layers: list[Any]
    windows: tuple[int | None, ...]
    embed: Any | None
    norm: Any | None
    head: Any | None
    hidden_size: int
    vocab_size: int
    embed_scale: float | None
    softcap: float | None
    array_masks: bool
    batched_decode: bool

    def embedding(self, token_ids: mx.array, dtype: DType) -> mx.array:
        """ids [batch, tokens] → [batch, tokens, hidden_size].

        Gemma's scale is rounded to the compute dtype and no further, as transformers does (mlx-lm: always bfloat16).
        """
        assert self.embed is not None
        hidden: mx.array = self.embed(token_ids)
        if self.embed_scale is None:
            return hidden
        return hidden * mx.array(self.embed_scale, MLX_DTYPE[dtype])

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, hidden_size] → float32 [rows, vocab_size]."""
        assert self.norm is not None
        normed = self.norm(hidden)
        logits: mx.array
        if self.head is not None:
            logits = self.head(normed)
        else:
            assert self.embed is not None
            logits = self.embed.as_linear(normed)
        if self.softcap is not None:
            logits = mx.tanh(logits / self.softcap) * self.softcap
        return logits.astype(mx.float32)
