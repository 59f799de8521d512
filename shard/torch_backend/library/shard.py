"""The library shard runs a transformers model's layers with our own KV, on packed ragged batches."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from shard.formats.dtypes import empty_output
from shard.stage import Batch, StageSpec
from shard.torch_backend import attention
from shard.torch_backend.attention import RaggedStep, Run, kv_transaction
from shard.torch_backend.kv import KVCache
from shard.torch_backend.library.config import library_config, slice_config
from shard.torch_backend.tensors import TORCH_DTYPES, to_numpy, to_torch
from transport.errors import UnsupportedModel


def build_empty_model(config: dict[str, Any], spec: StageSpec) -> tuple[Any, bool]:
    """A model for layers [first, last) with parameters on the meta device and real buffers, and whether it ties its
    embeddings. `Any`: a transformers ForCausalLM, whatever the family.

    What the stage lacks (embedding, final norm, head) is an identity.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    attention.register()
    full = library_config(config)
    # Buffers (rotary frequencies, Gemma's embedding scale) are in no checkpoint: they must be computed for real.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            slice_config(full, spec),
            dtype=TORCH_DTYPES[spec.compute_dtype],
            attn_implementation=attention.NAME,
            # The plain loop over experts: no copies of their weights, and no choice of kernel by who is in the batch.
            experts_implementation="eager",
            trust_remote_code=False,
        )
    if not spec.is_first:
        model.model.embed_tokens = torch.nn.Identity()
    if not spec.is_last:
        model.model.norm = torch.nn.Identity()
        model.lm_head = torch.nn.Identity()
    return model.eval(), bool(full.tie_word_embeddings)


class LibraryShard:
    """Implements ShardBackend over a loaded transformers model (`shard.torch_backend.build`)."""

    path: Literal["library"] = "library"

    def __init__(self, model: Any, spec: StageSpec, weights_bytes: int) -> None:
        self.spec = spec
        self.weights_bytes = weights_bytes
        self._model = model
        self._device = torch.device(spec.device)
        self.kv = KVCache(spec)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray:
        """See ShardBackend. Where it fails, the sequences of the batch are as before, or hold nothing."""
        if not batch.entries:
            config = self._model.config
            return empty_output(self.spec, config.hidden_size, config.vocab_size)
        runs = self._runs(batch)
        with kv_transaction(self.kv, batch, runs, self.spec.device):
            return self._run_model(batch, runs)

    def _runs(self, batch: Batch) -> list[Run]:
        runs = []
        offset = 0
        for entry in batch.entries:
            held = self.kv.sequence(entry.sequence)
            runs.append(Run(kv=held, offset=offset, num_tokens=len(entry.token_ids), start=entry.start))
            offset += len(entry.token_ids)
        return runs

    def _run_model(self, batch: Batch, runs: list[Run]) -> np.ndarray:
        step = RaggedStep(runs)
        positions = np.concatenate([np.arange(run.start, run.start + run.num_tokens) for run in runs])
        inputs: dict[str, Any] = {
            "position_ids": self._to_device(torch.from_numpy(positions))[None],
            "use_cache": False,  # The attention function keeps KV itself.
            "ragged_step": step,
        }
        if self.spec.is_first:
            ids = np.array([token for entry in batch.entries for token in entry.token_ids], dtype=np.int64)
            inputs["input_ids"] = self._to_device(torch.from_numpy(ids))[None]
        else:
            assert batch.hidden is not None, "only stage 0 works from token ids"
            hidden = self._to_device(to_torch(batch.hidden, self.spec.wire_dtype))
            inputs["inputs_embeds"] = hidden.to(TORCH_DTYPES[self.spec.compute_dtype])[None]
        if self.spec.is_last:
            rows = self._to_device(torch.from_numpy(_logit_rows(batch)))
            output = self._model(**inputs, logits_to_keep=rows).logits[0].to(torch.float32)
        else:
            output = self._model.model(**inputs).last_hidden_state[0].to(TORCH_DTYPES[self.spec.next_dtype])
        missed = set(range(self.spec.last - self.spec.first)) - step.attended
        if missed:
            raise UnsupportedModel(f"layers {sorted(missed)} of this model did not attend through the ragged attention")
        return to_numpy(output.cpu())

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)


def _logit_rows(batch: Batch) -> np.ndarray:
    """Rows of the packed step whose logits are wanted: each entry's last num_logits tokens."""
    rows: list[int] = []
    end = 0
    for entry in batch.entries:
        end += len(entry.token_ids)
        rows.extend(range(end - entry.num_logits, end))
    return np.array(rows, dtype=np.int64)
