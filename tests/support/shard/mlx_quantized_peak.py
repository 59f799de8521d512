"""Run as a program: loads layers of `mlx_load_peak`'s model, quantized, and prints how the process grew."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from shard.formats.affine import AffineForm, AffineRows
from shard.formats.checkpoint import TensorInfo
from shard.mlx_backend.build import build_mlx_shard, model_module
from shard.stage import StageSpec
from tests.support.shard.mlx_load_peak import HIDDEN, LAYER_PARAMS, LAYERS, MadeUp, peak_bytes

GROUP = 32
NUM_LAYERS = 3
# Four bits, and a scale and a bias of float32 for every group; the two norms are dense.
PACKED_BYTES = NUM_LAYERS * ((LAYER_PARAMS - 2 * HIDDEN) * (4 + 64 // GROUP) // 8 + 2 * HIDDEN * 4)


class MadeUpQuantized(MadeUp):
    """Matrices of 4 bits, each piece made as it is read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        form = AffineForm(bits=4, group=GROUP)
        return {
            name: replace(info, affine=form, file_bytes=math.prod(info.shape) * 5 // 8)
            if len(info.shape) == 2
            else info
            for name, info in super().tensors.items()
        }

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        columns = self.tensors[name].shape[-1]
        groups = np.ones((num_rows, columns // GROUP), np.float32)
        return AffineRows(q=np.full((num_rows, columns), 7, np.uint8), scales=groups, biases=-groups)


def main() -> None:
    spec = StageSpec(
        first=1,
        last=1 + NUM_LAYERS,
        num_layers=LAYERS + 1,
        device="mlx",
        compute_dtype="float32",
        wire_dtype="float32",
        next_dtype="float32",
        context_tokens=512,
        kv_capacity_tokens=512,
    )
    model_module("llama")
    before_bytes = peak_bytes()
    shard = build_mlx_shard(MadeUpQuantized(), spec)
    print(json.dumps({"weights_bytes": shard.weights_bytes, "grown_bytes": peak_bytes() - before_bytes}))


if __name__ == "__main__":
    main()
