"""Folders as mlx-lm writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.shard.safetensors_folders import CONFIG

mx = pytest.importorskip("mlx.core")


mx = pytest.importorskip("mlx.core")
UP = "model.layers.{}.mlp.up_proj"
COLUMNS = 256


def packed(
    rows: int, bits: int, group: int, *, columns: int = COLUMNS, dtype: Any = None, experts: int = 0, seed: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """A random weight as `mx.quantize` packs it ("weight", "scales", "biases"), and its dequantized numbers."""
    shape = (experts, rows, columns) if experts else (rows, columns)
    values = mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
    with mx.stream(mx.cpu):
        q, scales, biases = mx.quantize(values.astype(dtype or mx.float16), group_size=group, bits=bits)
        exact = mx.dequantize(q, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group, bits=bits)
        mx.eval(q, scales, biases, exact)
    return {"weight": q, "scales": scales, "biases": biases}, np.array(exact)


def write(folder: Path, modules: dict[str, dict[str, Any]], quantization: Any, **config: Any) -> Path:
    """A folder with two layers: `modules` are quantized, all else is dense."""
    folder.mkdir(exist_ok=True)
    facts = CONFIG | {"hidden_size": COLUMNS, "quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(facts | config))
    arrays = {"model.norm.weight": mx.ones(COLUMNS), "model.embed_tokens.weight": mx.ones((11, COLUMNS))}
    arrays |= {UP.format(layer) + ".weight": mx.ones((16, COLUMNS)) for layer in range(2)}
    for module, parts in modules.items():
        arrays |= {f"{module}.{leaf}": array for leaf, array in parts.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def written_by_mlx_lm(family: str, original: Path, folder: Path) -> Any:
    """The original quantized by mlx-lm into `folder`, and mlx-lm's model of it. `renamed`: by transformers, since."""
    from mlx_lm import utils

    with mx.stream(mx.cpu):
        renamed = {"num_experts": 4, "rope_theta": 10_000.0} if family == "qwen3_moe" else {}
        model, config = utils.load_model(original, model_config=renamed)
        model, config = utils.quantize_model(model, config, 32, 4)
        model.set_dtype(mx.float32)
        utils.save_model(folder, model)
        utils.save_config(config, folder / "config.json")
        model.eval()
    return model
