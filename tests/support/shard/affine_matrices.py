"""Affine matrices with known numbers, and a checkpoint that hands them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shard.formats.affine import AffineForm, AffineRows
from shard.formats.checkpoint import TensorInfo


@dataclass(kw_only=True)
class AffineTensors:
    """As much of a Checkpoint as loading projections takes."""

    forms: Mapping[str, AffineForm]
    numbers: Mapping[str, AffineRows]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(
                name=name, shape=rows.q.shape, format="made up", file_bytes=rows.q.size, affine=self.forms[name]
            )
            for name, rows in self.numbers.items()
        }

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        rows = self.numbers[name]
        span = slice(first, first + num_rows)
        return AffineRows(q=rows.q[span], scales=rows.scales[span], biases=rows.biases[span])


def random_rows(rows: int, columns: int, *, bits: int, group: int, seed: int, symmetric: bool = False) -> AffineRows:
    """Weights of about 0.1, scales in float16 as files have them; `symmetric` as Q4_0 has them, else with a minimum."""
    draw = np.random.default_rng(seed)
    scales = (draw.uniform(0.5, 2.0, (rows, columns // group)) * 0.3 / 2**bits).astype(np.float16).astype(np.float32)
    if symmetric:
        biases = -scales * np.float32(2 ** (bits - 1))
    else:
        biases = (-0.15 * draw.uniform(0.5, 1.5, scales.shape)).astype(np.float16).astype(np.float32)
    q = draw.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    return AffineRows(q=q, scales=scales, biases=biases)
