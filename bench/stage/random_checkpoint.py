"""Random checkpoints have a real model's shape, dense or quantized as mlx-lm writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
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


_FILE_BYTES = 2**30
_BLOCK_BYTES = 1 << 24
_FORMATS = {"U32": 4, "BF16": 2}

Stored = tuple[str, str, tuple[int, ...]]
"""Name, safetensors format, shape."""


def write_quantized(shape: LlamaShape, folder: Path, *, bits: int = 4, group: int = 64, seed: int = 0) -> Path:
    """Matrices, the embedding too, as uniform q of `bits` bits with bfloat16 scales and biases such that weights have a
    variance of about 1/fan-in; norms 1. Streamed to safetensors files of about 1 GiB, which are then no longer in the
    page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**shape.config(), "quantization": {"bits": bits, "group_size": group}}
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(seed)
    files = _split_stored(stored_tensors(shape, bits=bits, group=group))
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_quantized_file(folder / name, tensors, bits, group, generator)
        weight_map.update({stored[0]: name for stored in tensors})
    total = sum(_num_bytes(stored) for tensors in files for stored in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stored_tensors(shape: LlamaShape, *, bits: int, group: int) -> Iterator[Stored]:
    for name, dims in shape.tensors().items():
        if len(dims) == 1:
            yield name, "BF16", dims
            continue
        rows, columns = dims
        module = name.removesuffix(".weight")
        yield name, "U32", (rows, columns * bits // 32)
        for part in ("scales", "biases"):
            yield f"{module}.{part}", "BF16", (rows, columns // group)


def forget_pages(folder: Path) -> None:
    """Take the folder's files out of the page cache, where the system can: the next read is from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _num_bytes(stored: Stored) -> int:
    _, kind, dims = stored
    return int(np.prod(dims)) * _FORMATS[kind]


def _split_stored(tensors: Iterator[Stored]) -> list[list[Stored]]:
    files: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        if size > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(stored)
        size += _num_bytes(stored)
    return files


def _write_quantized_file(
    path: Path, tensors: list[Stored], bits: int, group: int, generator: np.random.Generator
) -> None:
    header: dict[str, object] = {}
    offset = 0
    for stored in tensors:
        name, kind, dims = stored
        size = _num_bytes(stored)
        header[name] = {"dtype": kind, "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, kind, dims in tensors:
            if kind == "U32":
                _write_random(file.write, _num_bytes((name, kind, dims)), generator)
            else:
                file.write(_factors(name, dims, bits, group).tobytes())


def _write_random(write: Callable[[bytes], int], size: int, generator: np.random.Generator) -> None:
    for done in range(0, size, _BLOCK_BYTES):
        write(generator.bytes(min(_BLOCK_BYTES, size - done)))


def _factors(name: str, dims: tuple[int, ...], bits: int, group: int) -> np.ndarray:
    """bfloat16 bits: the upper half of a float32. Scales vary by group, so that none is like the next."""
    if name.endswith("norm.weight"):
        return np.full(dims, 0x3F80, np.uint16)
    width = (12.0 / (dims[1] * group)) ** 0.5 / 2**bits
    wave = 1.0 + 0.25 * np.sin(np.arange(np.prod(dims), dtype=np.float32)).reshape(dims)
    scales = (np.float32(width) * wave).astype(np.float32)
    if name.endswith(".biases"):
        scales *= np.float32(-(2**bits - 1) / 2)
    return (scales.view(np.uint32) >> 16).astype(np.uint16)
