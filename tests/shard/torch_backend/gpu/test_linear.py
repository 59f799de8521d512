"""Quantized projections as other devices than the CPU run them, where torch's CPU can run them too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shard.formats.affine import AffineForm
from shard.torch_backend.gpu.linear import load_device_embedding_table
from tests.support.shard.affine_matrices import AffineTensors, random_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 32), (4, 128), (5, 64), (8, 32)])
def test_it_is_the_dequantized_matrix(bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.torch_backend.gpu.linear._SLICE_WEIGHTS", 7 * 256)
    monkeypatch.setattr("shard.torch_backend.gpu.linear._PIECE_WEIGHTS", 9 * 256)
    rows = random_rows(50, 256, bits=bits, group=group, seed=bits)
    checkpoint = AffineTensors(forms={"w": AffineForm(bits=bits, group=group)}, numbers={"w": rows})
    made = load_device_embedding_table(checkpoint, "w", "float32", CPU)  # type: ignore[arg-type]
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32))
    wanted = x @ torch.from_numpy(rows.dequantized()).T
    torch.testing.assert_close(made(x, 2), wanted, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([3, 49, 3])
    torch.testing.assert_close(made.rows(ids), torch.from_numpy(rows.dequantized())[ids], rtol=1e-6, atol=1e-6)
    assert made.num_bytes == 50 * 256 * (4 if bits <= 4 else 8) // 8 + 2 * 50 * 256 // group * 4
