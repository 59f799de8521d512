"""Random checkpoints of a real shape: what loads and runs like a model of that size, and says nothing sensible."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SHARD_BYTES = 2**30
_BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """A decoder of the Llama family; sizes in elements."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    context: int = 8192

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, under its Hugging Face name."""
        kv = self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "self_attn.q_proj.weight": (self.hidden, self.hidden),
                prefix + "self_attn.k_proj.weight": (kv, self.hidden),
                prefix + "self_attn.v_proj.weight": (kv, self.hidden),
                prefix + "self_attn.o_proj.weight": (self.hidden, self.hidden),
                prefix + "mlp.gate_proj.weight": (self.intermediate, self.hidden),
                prefix + "mlp.up_proj.weight": (self.intermediate, self.hidden),
                prefix + "mlp.down_proj.weight": (self.hidden, self.intermediate),
                prefix + "input_layernorm.weight": (self.hidden,),
                prefix + "post_attention_layernorm.weight": (self.hidden,),
            }
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def num_bytes(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.tensors().values()) * _BF16_BYTES

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


def write_checkpoint(shape: LlamaShape, folder: Path, *, seed: int = 0) -> Path:
    """Write it as bfloat16 safetensors files of about 1 GiB each, with an index. Values scale with 1/√fan-in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    generator = np.random.default_rng(seed)
    files = _split(shape.tensors())
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, tensors, generator)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": shape.num_bytes()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _split(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dims in shapes.items():
        if size > _SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = dims
        size += int(np.prod(dims)) * _BF16_BYTES
    return files


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], generator: np.random.Generator) -> None:
    header: dict[str, object] = {}
    offset = 0
    for name, dims in tensors.items():
        size = int(np.prod(dims)) * _BF16_BYTES
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for dims in tensors.values():
            values = _random(dims, generator)
            file.write(values.tobytes())


def _random(dims: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if len(dims) == 1:
        return np.full(dims, 0x3F80, dtype=np.uint16)  # 1.0, for norms
    # Uniform with the variance of 1/fan-in; the upper half of a float32 is a bfloat16.
    width = (12.0 / dims[1]) ** 0.5
    values = (generator.random(dims, dtype=np.float32) - 0.5) * np.float32(width)
    return (values.view(np.uint32) >> 16).astype(np.uint16)
