"""The fused shard runs the mainstream decoder family on packed ragged batches without the library's modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from shard.formats.dtypes import empty_output
from shard.stage import Batch, StageSpec
from shard.torch_backend.attention import RaggedStep, Run, kv_transaction
from shard.torch_backend.fused.config import FusedConfig
from shard.torch_backend.fused.cpu_program import MAX_DECODE_ROWS, cpu_programs
from shard.torch_backend.fused.layer import Layer
from shard.torch_backend.fused.ops import RmsNorm, rms_norm, softcapped
from shard.torch_backend.fused.step import FusedStep, PackedRows, pack_rows
from shard.torch_backend.kv import KVCache
from shard.torch_backend.linear import EmbeddingTable, Linear
from shard.torch_backend.tensors import TORCH_DTYPES, to_numpy, to_torch


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedModel:
    """A stage's weights. The embedding, used by its rows, is stage 0's; norm and head are the last one's."""

    config: FusedConfig
    embedding: EmbeddingTable | None
    layers: tuple[Layer, ...]
    norm: RmsNorm | None
    lm_head: Linear | None


class FusedShard:
    """Implements ShardBackend. On the CPU the residual stream is float32 whatever the compute dtype, which weights and
    KV have; elsewhere it has the compute dtype. Norms are computed in float32."""

    path: Literal["fused"] = "fused"

    def __init__(self, model: FusedModel, spec: StageSpec, weights_bytes: int) -> None:
        self.spec = spec
        self.weights_bytes = weights_bytes
        self._model = model
        self._device = torch.device(spec.device)
        compute_dtype = TORCH_DTYPES[spec.compute_dtype]
        self._dtype = torch.float32 if self._device.type == "cpu" else compute_dtype
        # Rounded as the library's is, whose embedding has the compute dtype: Gemma was trained so.
        self._embedding_scale = torch.tensor(model.config.embedding_scale, dtype=compute_dtype).item()
        self.kv = KVCache(spec)
        self._programs = None
        if self._device.type == "cpu":
            self._programs = cpu_programs(model.layers, model.config.hidden_size)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray:
        """See ShardBackend. Where it fails, the sequences of the batch are as before, or hold nothing."""
        if not batch.entries:
            return empty_output(self.spec, self._model.config.hidden_size, self._model.config.vocab_size)
        packing = pack_rows(batch.entries)
        runs = [
            Run(kv=self.kv.sequence(entry.sequence), offset=offset, num_tokens=len(entry.token_ids), start=entry.start)
            for entry, offset in zip(packing.entries, packing.offsets, strict=True)
        ]
        with kv_transaction(self.kv, batch, runs, self.spec.device):
            return self._run(batch, packing, runs)

    def _run(self, batch: Batch, packing: PackedRows, runs: Sequence[Run]) -> np.ndarray:
        x = self._embed_or_receive(batch, packing)
        step = self._step(packing, runs)
        self._run_layers(x, step)
        if self.spec.is_last:
            return self._logits(x, packing)
        hidden = x.to(TORCH_DTYPES[self.spec.next_dtype])
        return to_numpy(self._back_in_order(hidden, packing.rows_in_order).cpu())

    def _embed_or_receive(self, batch: Batch, packing: PackedRows) -> torch.Tensor:
        """The residual stream [tokens, hidden] of the packed rows: our own memory, as layers add to it in place."""
        if self._model.embedding is not None:
            rows = self._model.embedding.rows(torch.from_numpy(packing.ids).to(self._device))
            x = rows.to(self._dtype)
            return x if self._embedding_scale == 1.0 else x.mul_(self._embedding_scale)
        assert batch.hidden is not None, "only stage 0 works from token ids"
        hidden = to_torch(batch.hidden, self.spec.wire_dtype).to(self._device)
        if packing.source_rows is not None:
            return hidden[torch.from_numpy(packing.source_rows).to(self._device)].to(self._dtype)
        return hidden.to(self._dtype, copy=True)

    def _run_layers(self, x: torch.Tensor, step: FusedStep) -> None:
        """x [tokens, hidden] → after all layers, in its place."""
        if self._programs is not None and step.num_decode <= MAX_DECODE_ROWS:
            self._programs.run(x, step)
            return
        for layer in self._model.layers:
            layer(x, step)

    def _step(self, packing: PackedRows, runs: Sequence[Run]) -> FusedStep:
        return FusedStep(
            ragged=RaggedStep(runs),
            num_decode=packing.num_decode,
            positions=torch.from_numpy(packing.positions).to(self._device),
            ropes=self._model.config.ropes,
            dtype=self._dtype,
        )

    def _logits(self, x: torch.Tensor, packing: PackedRows) -> np.ndarray:
        """float32 [Σ num_logits, vocab], in the order of the batch's entries."""
        config, norm, lm_head = self._model.config, self._model.norm, self._model.lm_head
        assert norm is not None and lm_head is not None, "the last stage has both"
        if packing.logit_rows.size != x.shape[0]:
            x = x[torch.from_numpy(packing.logit_rows).to(self._device)]
        # Few rows, and all that is sampled depends on them: always by the precise kernel.
        logits = lm_head(rms_norm(x, norm), x.shape[0]).float()
        if config.logits_divisor != 1.0:
            logits.div_(config.logits_divisor)
        if config.final_softcap is not None:
            logits = softcapped(logits, config.final_softcap)
        return to_numpy(self._back_in_order(logits, packing.logits_in_order).cpu())

    def _back_in_order(self, rows: torch.Tensor, order: np.ndarray | None) -> torch.Tensor:
        return rows if order is None else rows[torch.from_numpy(order).to(self._device)]
