"""Made-up models and devices."""

from __future__ import annotations

from typing import Any

from devices.device import Device
from planner.demand import CPU_RESERVE_BYTES
from planner.profile import ModelProfile

MIB = 2**20
GIB = 2**30


def model(num_layers: int = 8, layer_mib: int = 100, **changes: Any) -> ModelProfile:
    """Layers of `layer_mib` MiB in 16 bits; embedding and head half of one; 1 KiB of KV a token and layer."""
    facts: dict[str, Any] = {
        "name": "made-up",
        "num_layers": num_layers,
        "hidden_size": 64,
        "context_tokens": 8192,
        "tied_embeddings": False,
        "layer_params": (layer_mib * MIB // 2,) * num_layers,
        "embed_params": layer_mib * MIB // 4,
        "norm_params": 64,
        "head_params": layer_mib * MIB // 4,
        "kv_elements_per_token": (512,) * num_layers,
        "windows": (None,) * num_layers,
        "legal_cuts": tuple(range(1, num_layers)),
    }
    return ModelProfile(**{**facts, **changes})


def device(name: str, *, gb_per_s: float = 10.0, usable_mib: int = 100_000, **changes: Any) -> Device:
    """A torch CPU in bfloat16 with `usable_mib` beside the runtime's reserve, in a memory pool of its own."""
    free_bytes = usable_mib * MIB + CPU_RESERVE_BYTES
    facts: dict[str, Any] = {
        "name": name,
        "backend": "torch",
        "kind": "cpu",
        "host": "here",
        "threads": 1,
        "free_bytes": free_bytes,
        "total_bytes": free_bytes,
        "bandwidth_bytes_per_s": gb_per_s * 1e9,
        "compute_dtype": "bfloat16",
        "memory_pool": name,
    }
    return Device(**{**facts, **changes})
