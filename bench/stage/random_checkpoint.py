"""Random checkpoints have a real model's shape, dense or quantized as mlx-lm writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FILE_BYTES = 2**30
_BLOCK_BYTES = 1 << 24
_FORMATS = {"U32": 4, "BF16": 2}
_ONE = 0x3F80  # In bfloat16.

StoredTensor = tuple[str, str, tuple[int, ...]]
"""Name, safetensors format, shape."""
Values = Callable[[StoredTensor], Iterable[bytes]]


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
        return sum(int(np.prod(shape)) for shape in self.tensors().values()) * _FORMATS["BF16"]

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
    """Write it in bfloat16. Values scale with 1/√fan-in."""
    generator = np.random.default_rng(seed)

    def values(tensor: StoredTensor) -> Iterable[bytes]:
        _, _, dims = tensor
        if len(dims) == 1:
            return (np.full(dims, _ONE, dtype=np.uint16).tobytes(),)  # a norm
        # Uniform with the variance of 1/fan-in.
        width = (12.0 / dims[1]) ** 0.5
        return (_bfloat16((generator.random(dims, dtype=np.float32) - 0.5) * np.float32(width)).tobytes(),)

    tensors = [(name, "BF16", dims) for name, dims in shape.tensors().items()]
    return _write_folder(folder, shape.config(), tensors, values)


def write_quantized(shape: LlamaShape, folder: Path, *, bits: int = 4, group: int = 64, seed: int = 0) -> Path:
    """Matrices, the embedding too, as uniform q of `bits` bits with bfloat16 scales and biases such that weights have a
    variance of about 1/fan-in; norms 1."""
    generator = np.random.default_rng(seed)

    def values(tensor: StoredTensor) -> Iterable[bytes]:
        name, kind, dims = tensor
        if kind == "BF16":
            return (_factors(name, dims, bits, group).tobytes(),)
        size = _num_bytes(tensor)
        return (generator.bytes(min(_BLOCK_BYTES, size - done)) for done in range(0, size, _BLOCK_BYTES))

    config = {**shape.config(), "quantization": {"bits": bits, "group_size": group}}
    return _write_folder(folder, config, list(quantized_tensors(shape, bits=bits, group=group)), values)


def quantized_tensors(shape: LlamaShape, *, bits: int, group: int) -> Iterator[StoredTensor]:
    for name, dims in shape.tensors().items():
        if len(dims) == 1:
            yield name, "BF16", dims
            continue
        rows, columns = dims
        module = name.removesuffix(".weight")
        yield name, "U32", (rows, columns * bits // 32)
        for part in ("scales", "biases"):
            yield f"{module}.{part}", "BF16", (rows, columns // group)


def _write_folder(folder: Path, config: dict[str, object], tensors: Sequence[StoredTensor], values: Values) -> Path:
    """safetensors files of about 1 GiB each, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    files: list[list[StoredTensor]] = [[]]
    for tensor in tensors:
        if sum(map(_num_bytes, files[-1])) > _FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, of_file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, of_file, values)
        weight_map.update({tensor[0]: name for tensor in of_file})
    index = {"metadata": {"total_size": sum(map(_num_bytes, tensors))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_file(path: Path, tensors: Sequence[StoredTensor], values: Values) -> None:
    header: dict[str, object] = {}
    offset = 0
    for tensor in tensors:
        name, kind, dims = tensor
        size = _num_bytes(tensor)
        header[name] = {"dtype": kind, "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            file.writelines(values(tensor))


def _num_bytes(tensor: StoredTensor) -> int:
    _, kind, dims = tensor
    return int(np.prod(dims)) * _FORMATS[kind]


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _factors(name: str, dims: tuple[int, ...], bits: int, group: int) -> np.ndarray:
    """bfloat16 bits. Scales vary by group, so that none is like the next."""
    if name.endswith("norm.weight"):
        return np.full(dims, _ONE, np.uint16)
    width = (12.0 / (dims[1] * group)) ** 0.5 / 2**bits
    wave = 1.0 + 0.25 * np.sin(np.arange(np.prod(dims), dtype=np.float32)).reshape(dims)
    scales = (np.float32(width) * wave).astype(np.float32)
    if name.endswith(".biases"):
        scales *= np.float32(-(2**bits - 1) / 2)
    return _bfloat16(scales)


def forget_pages(folder: Path) -> None:
    """Take the folder's files out of the page cache, where the system can: the next read is from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
