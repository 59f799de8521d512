"""The library shard runs a transformers model's layers with our own KV, on packed ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from shard.formats.checkpoint import Checkpoint
from shard.formats.dtypes import NUMPY_DTYPE, empty_output
from shard.formats.families import family_of
from shard.stage import Batch, StageSpec
from shard.torch_backend import attention
from shard.torch_backend.attention import RaggedStep, Run, kv_transaction
from shard.torch_backend.kv import KVCache
from shard.torch_backend.library.config import library_config, slice_config
from shard.torch_backend.memory import translate_load_oom
from shard.torch_backend.tensors import (
    TORCH_DTYPES,
    TensorNames,
    TensorPart,
    read_part,
    to_numpy,
    to_torch,
    total_file_bytes,
)
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


def build_library(
    checkpoint: Checkpoint, spec: StageSpec, device: torch.device, progress: Callable[[int, int], None]
) -> LibraryShard:
    """The library's empty module with each tensor read into its place; as `build_torch_shard`."""
    model, tied = build_empty_model(checkpoint.config, spec)
    experts = family_of(checkpoint.config).experts
    names = TensorNames(checkpoint.tensors, first=spec.first, tied_embeddings=tied, experts=experts)
    share_embedding = tied and spec.is_first and spec.is_last
    # All names and shapes are checked before the first byte is read: a wrong checkpoint fails at once.
    parts_of: dict[str, tuple[TensorPart, ...]] = {
        name: names.parts(name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if not (share_embedding and name == "lm_head.weight")
    }
    total_bytes = total_file_bytes(checkpoint.tensors, (part for parts in parts_of.values() for part in parts))
    reader = _ParameterReader(checkpoint, spec, device)
    read_bytes = weights_bytes = 0
    progress(0, total_bytes)
    for name, parts in parts_of.items():
        with translate_load_oom(name, spec.device):
            parameter = torch.empty_like(model.get_parameter(name), device=device, requires_grad=False)
            for part in parts:
                reader.read(part, parameter)
                read_bytes += checkpoint.tensors[part.name].file_bytes
                progress(read_bytes, total_bytes)
        _set_parameter(model, name, parameter)
        weights_bytes += parameter.nbytes
    if share_embedding:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.to(device)  # The buffers: rotary frequencies and scales.
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"parameters without weights: {left}"
    return LibraryShard(model, spec, weights_bytes)


class _ParameterReader:
    """Reads parts into parameters: on the CPU directly, elsewhere by way of one host buffer that is used again."""

    def __init__(self, checkpoint: Checkpoint, spec: StageSpec, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = spec.compute_dtype
        self._device = device
        self._buffer = np.empty(0, dtype=NUMPY_DTYPE[spec.compute_dtype])

    def read(self, part: TensorPart, parameter: torch.Tensor) -> None:
        if self._device.type == "cpu":
            read_part(self._checkpoint, part, to_numpy(parameter), self._dtype)
            return
        size = int(np.prod(part.shape))
        if self._buffer.size < size:
            self._buffer = np.empty(0, dtype=self._buffer.dtype)  # Freed before the larger one is allocated.
            self._buffer = np.empty(size, dtype=self._buffer.dtype)
        host = self._buffer[:size].reshape(part.shape)
        self._checkpoint.read_into(part.name, host, self._dtype)
        parameter[part.index].copy_(to_torch(host, self._dtype))


def _set_parameter(model: Any, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
