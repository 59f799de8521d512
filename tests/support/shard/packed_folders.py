"""AWQ and GPTQ folders, packed number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.shard.safetensors_folders import CONFIG

INPUTS, OUTPUTS = 256, 40
MODULE = "model.layers.0.mlp.up_proj"
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


def draw(bits: int, group: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [inputs, outputs], zeros and float16 scales [groups, outputs]; zeros from 1 on, as GPTQ's are."""
    rng = np.random.default_rng(seed)
    groups = INPUTS // group
    q = rng.integers(0, 2**bits, (INPUTS, OUTPUTS))
    zeros = rng.integers(1, 2**bits, (groups, OUTPUTS))
    return q, zeros, rng.standard_normal((groups, OUTPUTS)).astype(np.float16)


def pack(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """[n, m] → int32 [n, m · bits / 32]: number order[i] of each run goes to the i-th place of its word."""
    per_word = 32 // bits
    words = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), np.uint32)
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            word = 0
            for place, offset in enumerate(order or range(per_word)):
                word |= int(numbers[row, column * per_word + offset]) << (bits * place)
            words[row, column] = word
    return words.view(np.int32)


def awq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack(q, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales}


def gptq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, lacking: int = 1) -> dict[str, np.ndarray]:
    return {
        "qweight": np.ascontiguousarray(pack(q.T, bits).T),
        "qzeros": pack(zeros - lacking, bits),
        "scales": scales,
        "g_idx": (np.arange(len(q)) // (len(q) // len(scales))).astype(np.int32),
    }


def write(folder: Path, parts: dict[str, np.ndarray], quantization: dict[str, Any], module: str = MODULE) -> Path:
    folder.mkdir(exist_ok=True)
    config = CONFIG | {"hidden_size": INPUTS, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {
        "model.norm.weight": np.ones(INPUTS, np.float16),
        "model.embed_tokens.weight": np.ones((11, INPUTS), np.float16),
        "model.layers.1.mlp.up_proj.weight": np.ones((OUTPUTS, INPUTS), np.float16),
    }
    save_file(arrays | {f"{module}.{leaf}": array for leaf, array in parts.items()}, folder / "model.safetensors")
    return folder


def rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[inputs, outputs] → q, zeros and float16 scales of 4 bits in groups of 32 inputs, zeros from 1 on."""
    groups = values.reshape(-1, 32, values.shape[1])
    scales = ((groups.max(axis=1) - groups.min(axis=1)) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-groups.min(axis=1) / scales), 1, 15).astype(int)
    q = np.clip(np.rint(groups / scales[:, None]) + zeros[:, None], 0, 15).astype(int)
    return q.reshape(values.shape), zeros, scales
