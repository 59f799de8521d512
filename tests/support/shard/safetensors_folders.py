"""Hugging Face folders of a few tensors, in one safetensors file or in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (16, 8) for layer in range(2)}
    # Past float16's range, subnormal and exactly half way between two bfloat16 numbers.
    odd = torch.tensor([1e38, -1e38, 6e-8, 1e-40, 1.00390625, 1.01171875, float("nan"), float("-inf")])
    made = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    made["model.norm.weight"] = odd.to(dtype)
    return made


def write_folder(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_parts(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for part, (name, tensor) in enumerate(weights.items()):
        file = f"model-{part + 1:05}-of-{len(weights):05}.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
