"""The relative rms error of one real layer's projections, for each kernel that could compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.distributions import relative_rms
from shard.checkpoint import Checkpoint
from shard.open import open_checkpoint
from shard.torch_backend.cpu.linear import load_affine_linear


def kernel_errors(folder: Path, reference: Any, ids: list[int], layer: int) -> list[dict[str, Any]]:
    """For each quantized projection of `layer`: errors against float64 sums over the file's own numbers, of the
    activations that the reference model (Any: the library's classes are untyped) has there over `ids`."""
    checkpoint = open_checkpoint(folder)
    rows = []
    for name, x in _activations(reference, ids, layer).items():
        info = checkpoint.tensors[f"{name}.weight"]
        if info.affine is None:
            continue
        weight = np.empty(info.shape, np.float32)
        checkpoint.read_into(info.name, weight, "float32")
        wanted = x.double().numpy() @ weight.astype(np.float64).T
        kernels = _kernels(checkpoint, info.name, weight)
        errors = {kind: relative_rms(run(x), wanted) for kind, run in kernels.items()}
        rows.append(
            {
                "projection": name.rpartition(".")[2],
                "format": info.format,
                **{kind: float(f"{error:.4g}") for kind, error in errors.items()},
                "decode_over_dense": round(errors["decode"] / errors["dense_bfloat16"], 3),
            }
        )
    checkpoint.close()
    return rows


def _activations(model: Any, ids: list[int], layer: int) -> dict[str, torch.Tensor]:
    """What goes into each projection of the layer, float32 [tokens, columns], by the projection's name."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.startswith(f"model.layers.{layer}.") and isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(partial(_keep, found, name)))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def _keep(found: dict[str, torch.Tensor], name: str, module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
    found[name] = arguments[0][0].clone()


Run = Callable[[torch.Tensor], np.ndarray]


def _kernels(checkpoint: Checkpoint, name: str, weight: np.ndarray) -> dict[str, Run]:
    ours = load_affine_linear(checkpoint, [name], prefill=8)
    dense = torch.from_numpy(weight).bfloat16()
    kernels: dict[str, Run] = {
        "decode": lambda x: ours(x, x.shape[0]).numpy(),
        "prefill": lambda x: ours(x, 0).numpy(),
        "dense_bfloat16": lambda x: torch.nn.functional.linear(x.bfloat16(), dense).float().numpy(),
    }
    form = checkpoint.tensors[name].affine
    assert form is not None
    if form.bits == 4:
        kernels["aten_int4"] = _aten_int4(checkpoint, name, form.group)
    return kernels


def _aten_int4(checkpoint: Checkpoint, name: str, group: int) -> Run:
    """torch's own int4 kernel: w = scale · (q − 8) + zero, factors and activations in bfloat16."""
    rows = checkpoint.read_affine(name, 0, checkpoint.tensors[name].shape[0])
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(rows.q.astype(np.int32)), 1)
    zeros = rows.biases + np.float32(8) * rows.scales
    factors = torch.from_numpy(np.stack((rows.scales.T, zeros.T), axis=-1)).bfloat16().contiguous()

    def run(x: torch.Tensor) -> np.ndarray:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16().contiguous(), packed, group, factors)
        found: np.ndarray = y.float().numpy()
        return found

    return run
