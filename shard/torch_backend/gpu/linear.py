"""Quantized projections on CUDA and Metal.

Four bits go through torch's own int4 kernel where the device has it and the shape allows; it computes
(q − 8) · scale + zero in bfloat16. All else is kept as bytes or half-bytes and dequantized into a temporary, a slice of
rows at a time, for a dense product: scales and weights are rounded to the compute dtype, and single tokens are slower.

No kernel here knows decode from prefill, and none has run on CUDA or Metal yet: there was no device to prove it on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from shard.formats.affine import AffineForm
from shard.formats.checkpoint import Checkpoint
from shard.torch_backend.tensors import TORCH_DTYPES
from transport.messages.ring import DType

_PIECE_WEIGHTS = 1 << 22
_SLICE_WEIGHTS = 1 << 24
"""Dequantized at once: 32 MiB in bfloat16."""

_INNER_K_TILES = 8
_INT4_GROUPS = (32, 64, 128, 256)
_MIDDLE = 8


class PlainAffineLinear:
    """q in bytes [out, columns], or halves of bytes [out, columns / 2] (even columns low), scales and biases in the
    compute dtype [out, columns / group]."""

    def __init__(self, q: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, *, bits: int, group: int) -> None:
        self._q, self._scales, self._biases = q, scales, biases
        self._bits, self._group = bits, group
        self.num_bytes = q.nbytes + scales.nbytes + biases.nbytes

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        out, columns = self._q.shape[0], self._scales.shape[1] * self._group
        y = x.new_empty((x.shape[0], out))
        step = max(1, _SLICE_WEIGHTS // columns)
        for first in range(0, out, step):
            span = slice(first, first + step)
            y[:, span] = x @ self._dequantized(span).to(x.dtype).T
        return y

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self._dequantized(ids)

    def _dequantized(self, rows: slice | torch.Tensor) -> torch.Tensor:
        q = self._q[rows]
        if self._bits == 4:
            q = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)
        scales, biases = self._scales[rows], self._biases[rows]
        grouped = q.view(q.shape[0], -1, self._group).to(scales.dtype)
        return torch.addcmul(biases[..., None], grouped, scales[..., None]).flatten(1)


class Int4Linear:
    """Torch's int4 kernel (tinygemm): `packed` as `torch._convert_weight_to_int4pack` makes it, scales and zeros
    bfloat16 [columns / group, out, 2]."""

    def __init__(self, packed: torch.Tensor, factors: torch.Tensor, group: int) -> None:
        self._packed, self._factors, self._group = packed, factors, group
        self.num_bytes = packed.nbytes + factors.nbytes

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        y = torch._weight_int4pack_mm(x.to(torch.bfloat16), self._packed, self._group, self._factors)
        return y.to(x.dtype)


def load_device_linear(
    checkpoint: Checkpoint,
    name: str,
    dtype: DType,
    device: torch.device,
    read: Callable[[int], None] = lambda num_bytes: None,
) -> PlainAffineLinear | Int4Linear:
    """The affine tensor `name` [out, columns] on `device`, packed a piece at a time. Raises BadCheckpoint."""
    info = checkpoint.tensors[name]
    assert info.affine is not None, name
    out, columns = info.shape
    if dtype != "bfloat16" or info.affine.bits > 4 or not _has_int4(device, out, columns, info.affine):
        return load_device_embedding_table(checkpoint, name, dtype, device, read)
    # The int4 kernel's converter wants even columns high, unlike the plain form.
    q, scales, zeros = _packed(checkpoint, name, dtype, device, read, even_high=True, offset=_MIDDLE)
    tiled = torch._convert_weight_to_int4pack(q, _INNER_K_TILES)
    factors = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous()
    return Int4Linear(tiled, factors, info.affine.group)


def load_device_embedding_table(
    checkpoint: Checkpoint,
    name: str,
    dtype: DType,
    device: torch.device,
    read: Callable[[int], None] = lambda num_bytes: None,
) -> PlainAffineLinear:
    """As `load_device_linear`, in the form that can be read by rows."""
    form = checkpoint.tensors[name].affine
    assert form is not None, name
    q, scales, biases = _packed(checkpoint, name, dtype, device, read, even_high=False, offset=0)
    return PlainAffineLinear(q, scales, biases, bits=4 if form.bits <= 4 else 8, group=form.group)


def _packed(
    checkpoint: Checkpoint,
    name: str,
    dtype: DType,
    device: torch.device,
    read: Callable[[int], None],
    *,
    even_high: bool,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q in bytes or halves of bytes, scales, and biases + offset · scales, [out, …] each."""
    info = checkpoint.tensors[name]
    form = info.affine
    assert form is not None, name
    out, columns = info.shape
    bits = 4 if form.bits <= 4 else 8
    q = torch.empty((out, columns * bits // 8), dtype=torch.uint8, device=device)
    scales = torch.empty((out, columns // form.group), dtype=TORCH_DTYPES[dtype], device=device)
    zeros = torch.empty_like(scales)
    low, high = (1, 0) if even_high else (0, 1)
    step = max(1, _PIECE_WEIGHTS // columns)
    for first in range(0, out, step):
        count = min(step, out - first)
        rows = checkpoint.read_affine(name, first, count)
        span = slice(first, first + count)
        packed = rows.q if bits == 8 else rows.q[:, low::2] | (rows.q[:, high::2] << np.uint8(4))
        q[span].copy_(torch.from_numpy(packed))
        scales[span].copy_(torch.from_numpy(rows.scales))
        zeros[span].copy_(torch.from_numpy(rows.biases + np.float32(offset) * rows.scales))
        read(info.file_bytes * count // out)
    return q, scales, zeros


def _has_int4(device: torch.device, out: int, columns: int, form: AffineForm) -> bool:
    """CUDA from Ampere on, and Metal."""
    if form.group not in _INT4_GROUPS or out % 8 or columns % (16 * _INNER_K_TILES):
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "mps"
