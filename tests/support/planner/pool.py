"""Made-up models and devices."""

from __future__ import annotations

from typing import Any, get_args

from devices.hardware.device import Backend, Device
from planner.memory import CPU_RESERVE_BYTES, ModelProfile, WeightSizes
from transport.messages.ring import DTYPE_BYTES, WeightsForm

MIB = 2**20
GIB = 2**30


def model(num_layers: int = 8, layer_mib: int = 100, **changes: Any) -> ModelProfile:
    """Layers of `layer_mib` MiB in 16 bits; embedding and head half of one; 1 KiB of KV a token and layer. Dense, in
    every form, unless `sizes` are given."""
    end_params = layer_mib * MIB // 4
    embed_params, norm_params = changes.pop("embed_params", end_params), changes.pop("norm_params", 64)
    facts: dict[str, Any] = {
        "name": "made-up",
        "num_layers": num_layers,
        "hidden_size": 64,
        "context_tokens": 8192,
        "tied_embeddings": False,
        "layer_params": (layer_mib * MIB // 2,) * num_layers,
        "head_params": end_params,
        "kv_elements_per_token": (512,) * num_layers,
        "windows": (None,) * num_layers,
        "legal_cuts": tuple(range(1, num_layers)),
    }
    facts |= changes
    counts = (facts["layer_params"], embed_params, norm_params, facts["head_params"])
    return ModelProfile(**{"sizes": dense_sizes(*counts), **facts})


def quantizable(num_layers: int = 8) -> ModelProfile:
    """In 16 bits as the file has it; torch and MLX hold it in 8 and 4 bits with what scales take."""
    counts = ((50 * MIB,) * num_layers, 25 * MIB, 64, 25 * MIB)
    widths: dict[WeightsForm, float] = {"dense": 2, "stored": 2, "8-bit": 1.125, "4-bit": 0.625}
    sizes = tuple(
        part_bytes(weights, backend, "bfloat16", width, counts)
        for weights, width in widths.items()
        for backend in get_args(Backend)
    )
    return model(num_layers, sizes=sizes)


def dense_sizes(layers: tuple[int, ...], embed: int, norm: int, head: int) -> tuple[WeightSizes, ...]:
    """From counts of parameters, for every form, backend and dtype."""
    return tuple(
        part_bytes(weights, backend, dtype, width, (layers, embed, norm, head))
        for weights in get_args(WeightsForm)
        for backend in get_args(Backend)
        for dtype, width in DTYPE_BYTES.items()
    )


def part_bytes(
    weights: WeightsForm, backend: Backend, dtype: Any, width: float, counts: tuple[tuple[int, ...], int, int, int]
) -> WeightSizes:
    """Parts of so many parameters of `width` bytes each: layers, embedding, norm, head."""
    layers, *ends = counts
    embed, norm, head = (int(count * width) for count in ends)
    return WeightSizes(
        weights=weights,
        backend=backend,
        dtype=dtype,
        layers=tuple(int(count * width) for count in layers),
        embed=embed,
        norm=norm,
        head=head,
    )


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
