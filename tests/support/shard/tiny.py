"""Tiny seeded random models of transformers, their files, and the unsplit reference logits: every backend's oracle.

Every model has 4 layers, hidden 64, 4 heads on 2 KV heads and a vocabulary of 128; families with sliding windows have
window 8 and, where they can, mixed layer types. Weights are drawn wide enough for the layers to matter in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from shard.formats.affine import AffineForm, AffineRows, quantize_rows
from shard.formats.checkpoint import TensorInfo, is_quantizable
from shard.formats.spec import ModelSpec
from transport.errors import BadCheckpoint
from transport.messages.ring import DType

NUM_LAYERS = 4
VOCAB_SIZE = 128
WINDOW = 8

_COMMON: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 24},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0, 1]}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

CORE_FAMILIES = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "qwen3_moe", "mixtral")


def tiny_config(family: str) -> Any:
    """The transformers config of a tiny model. `Any`: transformers is untyped."""
    name, overrides = FAMILIES[family]
    return getattr(transformers, name)(**{**_COMMON, **overrides})


def tiny_model(family: str, seed: int) -> Any:
    """A random model in fp32, eval, with plain (eager) attention, the one implementation that honours every feature."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            tiny_config(family), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        for name, parameter in model.named_parameters():
            scale = 0.1 if "norm" in name or name.endswith(".bias") else 0.15
            parameter.data.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def save_tiny(family: str, seed: int, folder: Path) -> Path:
    """Save the model as a Hugging Face folder (config.json, model.safetensors) and return it."""
    tiny_model(family, seed).save_pretrained(folder)
    return folder


@torch.inference_mode()
def reference_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Logits [len(ids), vocab] of the unsplit model on the whole sequence at once."""
    logits: np.ndarray = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()
    return logits


@torch.inference_mode()
def router_gap(model: Any, ids: Sequence[int]) -> float:
    """The smallest gap between the last chosen expert's probability and the first left out; inf without experts.

    Below 1e-5 rounding may choose another expert: such seeds prove nothing and are excluded by rule.
    """
    gaps: list[float] = []
    hooks = []
    for module in model.modules():
        if module.__class__.__name__.endswith("TopKRouter"):

            def note(module: Any, inputs: Any, output: Any) -> None:
                probabilities = output[0].float().softmax(-1).sort(-1, descending=True).values
                gaps.append(float((probabilities[:, module.top_k - 1] - probabilities[:, module.top_k]).min()))

            hooks.append(module.register_forward_hook(note))
    reference_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return min(gaps, default=float("inf"))


@dataclass(kw_only=True)
class MemoryCheckpoint:
    """A Checkpoint over arrays in memory; `reads` counts how often each tensor was read, dense or not.

    `affine` are the tensors that are quantized; `arrays` has their dequantized numbers.
    """

    spec: ModelSpec
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    affine: dict[str, tuple[AffineForm, AffineRows]] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: self._info(name, array) for name, array in self.arrays.items()}

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        self._store(self._array(name), name, out, dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        matrix = self._array(name)
        self._store(matrix.reshape(-1, matrix.shape[-1])[first : first + len(out)], name, out, dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        if name not in self.affine:
            raise BadCheckpoint(f"tensor {name} is not quantized")
        rows = self.affine[name][1]
        if not 0 <= first <= first + num_rows <= len(rows.q):
            raise BadCheckpoint(f"tensor {name} has no rows [{first}, {first + num_rows})")
        self.reads[name] = self.reads.get(name, 0) + 1
        wanted = slice(first, first + num_rows)
        return AffineRows(q=rows.q[wanted], scales=rows.scales[wanted], biases=rows.biases[wanted])

    def close(self) -> None:
        self.arrays = {}

    def _info(self, name: str, array: np.ndarray) -> TensorInfo:
        if name not in self.affine:
            return TensorInfo(name=name, shape=array.shape, format="F32", file_bytes=array.nbytes)
        form, rows = self.affine[name]
        file_bytes = rows.q.size * form.bits // 8 + rows.scales.nbytes + rows.biases.nbytes
        format = f"MLX {form.bits}-bit"
        return TensorInfo(name=name, shape=array.shape, format=format, file_bytes=file_bytes, affine=form)

    def _array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise BadCheckpoint(f"tensor {name} is missing")
        return self.arrays[name]

    def _store(self, array: np.ndarray, name: str, out: np.ndarray, dtype: DType) -> None:
        if array.shape != out.shape:
            raise BadCheckpoint(f"tensor {name} has shape {array.shape}, wanted {out.shape}")
        self.reads[name] = self.reads.get(name, 0) + 1
        if dtype == "bfloat16":
            out[...] = torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
        else:
            out[...] = array


def memory_checkpoint(model: Any, folder: Path) -> MemoryCheckpoint:
    """The model's tensors under the names its files have (one tensor per expert), by way of save_pretrained."""
    from safetensors.numpy import load_file

    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    arrays = load_file(folder / "model.safetensors")
    config = model.config.to_dict()
    return MemoryCheckpoint(spec=_spec(model), config=config, arrays=arrays)


def quantized_checkpoint(model: Any, folder: Path, bits: int = 4, group: int = 32) -> MemoryCheckpoint:
    """As `memory_checkpoint`, its matrices affine where the columns allow it; dense reads give the dequantized numbers.

    The folder holds these too: `AutoModelForCausalLM.from_pretrained(folder)` is the unsplit dense model of the same
    numbers.
    """
    from safetensors.numpy import save_file

    checkpoint = memory_checkpoint(model, folder)
    for name, array in checkpoint.arrays.items():
        if is_quantizable(name, array.shape) and array.shape[-1] % group == 0:
            rows = quantize_rows(array, bits, group)
            checkpoint.affine[name] = (AffineForm(bits=bits, group=group), rows)
            checkpoint.arrays[name] = rows.dequantized()
    save_file(checkpoint.arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def _spec(model: Any) -> ModelSpec:
    config = model.config
    inner = model.model
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    windows = tuple(
        window if layer_types is None or layer_types[index] == "sliding_attention" else None
        for index in range(NUM_LAYERS)
    )
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    return ModelSpec(
        architecture=config.model_type,
        num_layers=NUM_LAYERS,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        layer_params=tuple(count(layer) for layer in inner.layers),
        embed_params=count(inner.embed_tokens),
        norm_params=count(inner.norm),
        head_params=count(model.lm_head),
        kv_elements_per_token=(2 * config.num_key_value_heads * 16,) * NUM_LAYERS,
        windows=windows,
        legal_cuts=tuple(range(1, NUM_LAYERS)),
        stored_dtype="float32",
        file_bytes=sum(parameter.numel() * 4 for parameter in model.parameters()),
    )
