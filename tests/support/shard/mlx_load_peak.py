"""Run as a program: loads two of four layers of a made-up model on MLX and prints how the process grew, as JSON.

The peak of a process that ran other tests would say nothing, and torch must not come along.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shard.formats.affine import AffineRows
from shard.formats.checkpoint import TensorInfo
from shard.formats.spec import ModelSpec
from shard.mlx_backend.build import build_mlx_shard, model_module
from shard.stage import StageSpec
from transport.messages.ring import DType

LAYERS, HIDDEN, INNER, VOCAB = 4, 1024, 6144, 32_000
LARGEST_BYTES = 4 * INNER * HIDDEN

_LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
LAYER_PARAMS = sum(int(np.prod(shape)) for shape in _LAYER_SHAPES.values())


class MadeUp:
    """A Checkpoint whose tensors are ones, made as they are read."""

    spec = ModelSpec(
        architecture="llama",
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        context_tokens=512,
        tied_embeddings=False,
        layer_params=(LAYER_PARAMS,) * LAYERS,
        embed_params=VOCAB * HIDDEN,
        norm_params=HIDDEN,
        head_params=VOCAB * HIDDEN,
        kv_elements_per_token=(2 * HIDDEN,) * LAYERS,
        windows=(None,) * LAYERS,
        legal_cuts=(1, 2, 3),
        stored_dtype="BF16",
        file_bytes=0,
    )

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_attention_heads": 16,
            "rms_norm_eps": 1e-6,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        shapes = {
            f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in _LAYER_SHAPES.items()
        }
        return {
            name: TensorInfo(name=name, shape=shape, format="BF16", file_bytes=2 * int(np.prod(shape)))
            for name, shape in shapes.items()
        }

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        out[...] = 1

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        out[...] = 1

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        raise AssertionError("nothing here is quantized")

    def close(self) -> None: ...


def main() -> None:
    spec = StageSpec(
        first=1,
        last=3,
        num_layers=LAYERS,
        device="mlx",
        compute_dtype="float32",
        wire_dtype="float32",
        next_dtype="float32",
        context_tokens=512,
        kv_capacity_tokens=512,
    )
    model_module("llama")
    before_bytes = peak_bytes()
    shard = build_mlx_shard(MadeUp(), spec)
    found = {
        "weights_bytes": shard.weights_bytes,
        "grown_bytes": peak_bytes() - before_bytes,
        "imported": [name for name in ("torch", "transformers", "mlx_lm") if name in sys.modules],
    }
    print(json.dumps(found))


def peak_bytes() -> int:
    """The most memory that this process held. Linux passes ru_maxrss on to a new program, the tests' own memory with
    it, so that a peak below that would not be seen."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
