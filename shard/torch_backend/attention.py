"""Attention over a packed ragged step: each run attends to its own sequence's KV; a step that fails leaves none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from shard.stage import Batch
from shard.torch_backend.kv import KVCache, SequenceKV
from shard.torch_backend.memory import translate_step_oom
from transport.errors import UnsupportedModel

NAME = "potluck_ragged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Tokens [offset, offset + num_tokens) of the packed step are positions from `start` of one sequence."""

    kv: SequenceKV
    offset: int
    num_tokens: int
    start: int


@dataclass(slots=True)
class RaggedStep:
    """One step's runs, which layers have attended, and the masks that layers of one kind share."""

    runs: Sequence[Run]
    attended: set[int] = field(default_factory=set)
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, run: Run, first: int, window: int | None, device: torch.device) -> torch.Tensor:
        """[num_tokens, positions from `first`] bool, true where a token may look: causal, within its window."""
        key = (run.offset, first, window)
        found = self.masks.get(key)
        if found is None:
            end = run.start + run.num_tokens
            queries = torch.arange(run.start, end, device=device)[:, None]
            positions = torch.arange(first, end, device=device)[None, :]
            found = positions <= queries
            if window is not None:
                found &= positions > queries - window
            self.masks[key] = found
        return found


class AttentionRules(NamedTuple):
    """A layer's window in tokens, and what scores are scaled by. `softcap` caps them; `sinks` [heads] take part in the
    softmax."""

    window: int | None
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


def register() -> None:
    """Make the attention known to transformers; safe to call again."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, ragged_attention)


def ragged_attention(  # noqa: PLR0913  transformers passes these
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    ragged_step: RaggedStep,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = None,
    is_causal: bool | None = None,
    output_router_logits: bool | None = None,
    **unknown: Any,  # whatever a model passes: refused below
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim] → [1, tokens, heads, head_dim].

    Raises UnsupportedModel on any argument it does not know: ignoring one would be silently wrong.
    """
    # Some modules say it in a keyword, some (Gemma 3) only in an attribute and in the mask that they don't get here.
    is_bidirectional = is_causal is False or not getattr(module, "is_causal", True)
    if unknown or attention_mask is not None or dropout or is_bidirectional:
        named = sorted(unknown) or ["attention_mask, dropout or bidirectional attention"]
        raise UnsupportedModel(f"{type(module).__name__} asks for attention features not known here: {named}")
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if index in ragged_step.attended:
        raise UnsupportedModel(f"{type(module).__name__} attends twice in layer {index}")
    ragged_step.attended.add(index)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = AttentionRules(sliding_window, scale, softcap, s_aux)
    outputs = []
    for run in ragged_step.runs:
        span = slice(run.offset, run.offset + run.num_tokens)
        layer = run.kv.layer(index, sliding_window)
        keys, values, first = layer.append(run.start, key[0, :, span], value[0, :, span])
        outputs.append(
            attend(
                query[0, :, span],
                keys,
                values,
                run,
                first,
                ragged_step,
                rules,
            )
        )
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return packed.transpose(0, 1).unsqueeze(0), None


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    run: Run,
    first: int,
    step: RaggedStep,
    rules: AttentionRules,
) -> torch.Tensor:
    """A run's query [heads, tokens, head_dim] over keys and values [kv_heads, positions from `first`, head_dim] → as
    query."""
    window, scale, softcap, sinks = rules
    if softcap is None and sinks is None:
        return _sdpa_attention(query, keys, values, run, first, window, scale, step)
    mask = step.mask(run, first, window, query.device)
    return _plain_attention(query, keys, values, mask, scale, softcap, sinks)


def _sdpa_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    run: Run,
    first: int,
    window: int | None,
    scale: float,
    step: RaggedStep,
) -> torch.Tensor:
    """query [heads, tokens, head_dim], keys and values [kv_heads, positions, head_dim] → as query."""
    if run.num_tokens == 1:
        # One token sees all that is held: the heads of a group become the rows of one small matrix, no mask needed.
        grouped = query.reshape(1, keys.shape[0], -1, query.shape[-1])
        attended = scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
        return attended.reshape(query.shape[0], 1, -1)
    whole = run.start == 0 and (window is None or run.num_tokens <= window)
    mask = None if whole else step.mask(run, first, window, query.device)
    return scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
    )[0]


def _plain_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As `_sdpa_attention`, written out for scores that are capped (Gemma 2) or share their softmax with a learned sink
    per head (gpt-oss, `sinks` [heads])."""
    kv_heads, head_dim = keys.shape[0], query.shape[-1]
    grouped = query.reshape(kv_heads, -1, query.shape[1], head_dim)
    scores = torch.matmul(grouped, keys[:, None].transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().reshape(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[1]].to(values.dtype)
    return torch.matmul(weights, values[:, None]).reshape(query.shape[0], query.shape[1], head_dim)


@contextmanager
def kv_transaction(kv: KVCache, batch: Batch, runs: Sequence[Run], device: str) -> Iterator[None]:
    """Around what runs the layers. Where it fails, the sequences of the batch are as before, or hold nothing; out of
    memory is StageFailed."""
    assert all(run.start == run.kv.length for run in runs), "the caller truncates, and refuses what lies beyond"
    try:
        with translate_step_oom(device, sum(run.num_tokens for run in runs), kv.num_bytes):
            yield
    except Exception:
        # Layers that had run hold rows beyond `start`; a sliding one may have dropped what going back needs.
        for entry in batch.entries:
            kv.truncate(entry.sequence, entry.start)
        raise
    for run in runs:
        run.kv.length = run.start + run.num_tokens
