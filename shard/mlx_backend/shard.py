"""The MLX side of `ShardBackend`: the modules of a stage, and their layers' KV, on packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map

from shard.formats.dtypes import NUMPY_DTYPE, empty_output
from shard.mlx_backend.kv import MlxDecodeKV, MlxKVStore, chunk_mask, decode_mask
from shard.stage import Batch, StageSpec
from transport.errors import BadMessage, StageFailed
from transport.messages.ring import DType, Entry

MLX_DTYPE: dict[DType, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def to_mlx(array: np.ndarray, dtype: DType) -> mx.array:
    """A copy in MLX's memory; `array` holds `dtype` (uint16 for bfloat16)."""
    copied = mx.array(array)
    return copied.view(mx.bfloat16) if dtype == "bfloat16" else copied


def to_wire(array: mx.array, dtype: DType) -> mx.array:
    """`array` rounded to `dtype`, in a form that NumPy can take."""
    rounded = array.astype(MLX_DTYPE[dtype])
    return rounded.view(mx.uint16) if dtype == "bfloat16" else rounded


CHUNK_TOKENS = 16
"""From here on making tiles dense is faster for every shape that was measured."""

_TILE_WEIGHTS = 1 << 18


# mypy does not see through mlx.nn: hence the ignored errors.
class CpuLinear(nn.Module):  # type: ignore[name-defined, misc]
    """A QuantizedLinear for x [1, tokens, columns], where a chunk's own length chooses the kernel.

    Decodes, one token in each row of a batch, always take MLX's: who else is in the step changes nothing.
    """

    def __init__(self, quantized: Any) -> None:
        super().__init__()
        self.quantized = quantized

    def __call__(self, x: mx.array) -> mx.array:
        if x.ndim != 3 or x.shape[1] < CHUNK_TOKENS:
            product: mx.array = self.quantized(x)
            return product
        return mx.stack([self._chunk(rows) for rows in x])

    def _chunk(self, x: mx.array) -> mx.array:
        """[tokens, columns] → [tokens, rows of the weights]."""
        module = self.quantized
        # As columns: BLAS runs along the tokens, 2.4 times as fast as dot products of rows.
        columns = mx.contiguous(x.T)
        step = max(1, _TILE_WEIGHTS // x.shape[1])
        tiles = []
        for first in range(0, module.weight.shape[0], step):
            weight, scales, biases = (
                part[first : first + step] for part in (module.weight, module.scales, module.biases)
            )
            tiles.append(mx.dequantize(weight, scales, biases, module.group_size, module.bits) @ columns)
        product = mx.contiguous(mx.concatenate(tiles).T)
        return product + module.bias if "bias" in module else product


def use_cpu_kernels(layer: Any) -> None:
    """Give the layer's quantized projections their way with chunks."""

    def replaced(module: Any) -> Any:
        return CpuLinear(module) if isinstance(module, nn.QuantizedLinear) else module  # type: ignore[attr-defined]

    is_leaf = nn.Module.is_module  # type: ignore[attr-defined]
    layer.update_modules(tree_map(replaced, layer.leaf_modules(), is_leaf=is_leaf))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModules:
    """Modules of mlx-lm (untyped, so `Any`); `embed` is also the head where embeddings are tied and `head` is None."""

    layers: list[Any]
    windows: tuple[int | None, ...]
    embed: Any | None
    norm: Any | None
    lm_head: Any | None
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
        if self.lm_head is not None:
            logits = self.lm_head(normed)
        else:
            assert self.embed is not None
            logits = self.embed.as_linear(normed)
        if self.softcap is not None:
            logits = mx.tanh(logits / self.softcap) * self.softcap
        return logits.astype(mx.float32)


class MlxShard:
    """See `ShardBackend`. Single tokens of several sequences run as one batch, each longer chunk alone. `kv_group`: how
    many numbers of the KV share a scale, where it is held in 8 bits."""

    def __init__(
        self, *, spec: StageSpec, modules: StageModules, weights_bytes: int, kv_group: int | None = None
    ) -> None:
        self.spec = spec
        self.weights_bytes = weights_bytes
        self._modules = modules
        self.kv = MlxKVStore(modules.windows, spec.context_tokens, kv_group)

    def forward(self, batch: Batch) -> np.ndarray:
        self._check(batch)
        if not batch.entries:
            return empty_output(self.spec, self._modules.hidden_size, self._modules.vocab_size)
        try:
            return self._forward(batch)
        except (RuntimeError, MemoryError) as error:  # MLX reports allocation failures as RuntimeError
            for entry in batch.entries:
                self.kv.release(entry.sequence)
            raise StageFailed(
                f"MLX could not run {_num_tokens(batch.entries)} tokens in {len(batch.entries)} sequences: {error}",
                hint="lower the context or the number of requests at once if memory ran out",
            ) from error

    def _forward(self, batch: Batch) -> np.ndarray:
        entries = batch.entries
        inputs = None if batch.hidden is None else to_mlx(batch.hidden, self.spec.wire_dtype)
        begins = np.cumsum([0, *(len(entry.token_ids) for entry in entries)])
        outputs: list[mx.array] = [mx.zeros((0, self._modules.hidden_size))] * len(entries)
        for group in self._groups(entries):
            members = [entries[i] for i in group]
            if inputs is None:
                hidden = self._embed(members)
            else:
                rows = [inputs[int(begins[i]) : int(begins[i + 1])] for i in group]
                hidden = mx.stack(rows).astype(MLX_DTYPE[self.spec.compute_dtype])
            hidden = self._layers(members, hidden)
            for row, i in enumerate(group):
                outputs[i] = hidden[row]
        result = self._finish(entries, outputs)
        # One evaluation a step. The KV is named because an entry that wants no logits would leave it uncomputed.
        mx.eval(result, [slot.arrays for entry in entries for slot in self.kv.layers(entry.sequence)])
        return np.array(result)

    def _groups(self, entries: Sequence[Entry]) -> list[list[int]]:
        """Indices of entries that run together: the single tokens in one group, each chunk in its own."""
        singles = [i for i, entry in enumerate(entries) if len(entry.token_ids) == 1]
        distinct = len({entry.sequence for entry in entries}) == len(entries)
        if not self._modules.batched_decode or not distinct or len(singles) < 2:
            return [[i] for i in range(len(entries))]
        return [singles, *([i] for i, entry in enumerate(entries) if len(entry.token_ids) != 1)]

    def _embed(self, members: Sequence[Entry]) -> mx.array:
        ids = mx.array([list(entry.token_ids) for entry in members])
        return self._modules.embedding(ids, self.spec.compute_dtype)

    def _layers(self, members: Sequence[Entry], hidden: mx.array) -> mx.array:
        """One chunk [1, tokens, hidden_size], or single tokens [batch, 1, hidden_size], through all layers."""
        sequences = [self.kv.layers(entry.sequence) for entry in members]
        starts = [slots[0].offset for slots in sequences]
        assert starts == [entry.start for entry in members]
        masks = {window: self._mask(starts, hidden.shape[1], window) for window in set(self._modules.windows)}
        offset = mx.array(starts) if len(members) > 1 else None
        for i, (layer, window) in enumerate(zip(self._modules.layers, self._modules.windows, strict=True)):
            slots = [sequence[i] for sequence in sequences]
            cache = slots[0] if offset is None else MlxDecodeKV(slots, offset)
            hidden = layer(hidden, masks[window], cache)
        return hidden

    def _mask(self, starts: Sequence[int], num_tokens: int, window: int | None) -> mx.array | str | None:
        if len(starts) > 1:
            return decode_mask(starts, window)
        return chunk_mask(starts[0], num_tokens, window, as_array=self._modules.array_masks)

    def _finish(self, entries: Sequence[Entry], outputs: Sequence[mx.array]) -> mx.array:
        if not self.spec.is_last:
            return to_wire(mx.concatenate(list(outputs)), self.spec.next_dtype)
        rows = [
            output[output.shape[0] - entry.num_logits :]
            for entry, output in zip(entries, outputs, strict=True)
            if entry.num_logits
        ]
        if not rows:
            return mx.zeros((0, self._modules.vocab_size), mx.float32)
        return self._modules.logits(mx.concatenate(rows))

    def _check(self, batch: Batch) -> None:
        """What MLX would not notice: an index beyond the embedding reads foreign memory."""
        if any(not entry.token_ids for entry in batch.entries):
            raise BadMessage("a step without tokens reached a shard", hint="this is a bug in Potluck; please report it")
        if batch.hidden is None and batch.entries:
            largest = max(max(entry.token_ids) for entry in batch.entries)
            smallest = min(min(entry.token_ids) for entry in batch.entries)
            if smallest < 0 or largest >= self._modules.vocab_size:
                raise BadMessage(
                    f"token ids reach from {smallest} to {largest}; the model has {self._modules.vocab_size}",
                    hint="the tokenizer does not belong to this model",
                )
        if batch.hidden is None:
            return
        shape = (_num_tokens(batch.entries), self._modules.hidden_size)
        wanted = NUMPY_DTYPE[self.spec.wire_dtype]
        if batch.hidden.shape != shape or batch.hidden.dtype != wanted:
            raise BadMessage(
                f"hidden states have shape {batch.hidden.shape} of {batch.hidden.dtype}; the step needs {shape} of "
                f"{wanted}"
            )


def _num_tokens(entries: Sequence[Entry]) -> int:
    return sum(len(entry.token_ids) for entry in entries)
