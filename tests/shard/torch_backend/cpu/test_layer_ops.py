"""The native operations of a decode step give what torch's own do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shard.torch_backend.cpu.decode_attention import DecodeAttention
from shard.torch_backend.cpu.heads import AttentionShape
from shard.torch_backend.cpu.norm_and_gate import Activation, CpuGatedActivation, CpuRmsNorm
from shard.torch_backend.tensors import TORCH_DTYPES
from tests.support.shard.random_tensors import normal, turned
from transport.messages.ring import DType

EXACT = {"rtol": 2e-6, "atol": 2e-6}
KV_TOLERANCE: dict[DType, float] = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.mark.parametrize("width", [16, 576, 2048])
def test_norm(width: int) -> None:
    x, weight = normal(3, width), normal(width, seed=1)
    norm = CpuRmsNorm(weight, 1e-5)
    torch.testing.assert_close(norm(x), functional.rms_norm(x, (width,), weight, 1e-5), **EXACT)


def test_norm_adds_in_place() -> None:
    x, added, weight = normal(2, 64), normal(2, 64, seed=1), normal(64, seed=2)
    wanted = x + added
    got = CpuRmsNorm(weight, 1e-6)(x, added)
    assert torch.equal(x, wanted)
    torch.testing.assert_close(got, functional.rms_norm(wanted, (64,), weight, 1e-6), **EXACT)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gate(activation: Activation) -> None:
    wide = torch.cat((torch.linspace(-100, 100, 96).expand(2, -1), normal(2, 96), normal(2, 8)), dim=1)
    gate_up = wide[:, :192]  # A view of padded rows, as projections give.
    active = functional.silu if activation == "silu" else lambda x: functional.gelu(x, approximate="tanh")
    wanted = active(gate_up[:, :96]) * gate_up[:, 96:]
    torch.testing.assert_close(CpuGatedActivation(activation)(gate_up), wanted, **EXACT)


def reference(
    shape: AttentionShape, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, angles: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:  # fmt: skip
    """One token [heads + 2 · kv_heads, head_dim] over keys, values [kv_heads, positions, head_dim]; writes its key
    and value as the last."""
    heads, kv_heads = shape.heads, shape.kv_heads
    q, k, v = qkv.split((heads, kv_heads, kv_heads))
    if norms is not None:
        q, k = (functional.rms_norm(x, (shape.head_dim,), w, shape.eps) for x, w in zip((q, k), norms, strict=True))
    q, k = turned(q, angles), turned(k, angles)
    keys[:, -1], values[:, -1] = k, v
    scores = torch.einsum("hgd,hpd->hgp", q.view(kv_heads, -1, shape.head_dim), keys.float()) * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    return torch.einsum("hgp,hpd->hgd", scores.softmax(-1), values.float()).reshape(-1)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "eps"),
    [
        (9, 3, 64, 64, None),
        (4, 2, 16, 0, None),
        (4, 2, 16, 16, 1e-5),
        (8, 1, 256, 256, 1e-6),
        (16, 2, 128, 128, 1e-6),
        (4, 4, 96, 64, None),
    ],
)
def test_attention(heads: int, kv_heads: int, head_dim: int, rotary: int, eps: float | None, kv_dtype: DType) -> None:
    shape = AttentionShape(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=rotary, kv_dtype=kv_dtype, scale=0.11, eps=eps,
        softcap=2.0 if heads == 4 else None,
    )  # fmt: skip
    norms = None if eps is None else (normal(head_dim, seed=5), normal(head_dim, seed=6))
    attention = DecodeAttention(shape, *(norms or (None, None)))
    counts = (1, 15, 16, 17, 250)
    qkv = normal(len(counts), (heads + 2 * kv_heads) * head_dim)
    angles = normal(len(counts), rotary // 2, seed=2)
    cos, sin = angles.cos(), angles.sin()
    seats, wanted, caches = [], [], []
    for row, count in enumerate(counts):
        dtype = TORCH_DTYPES[kv_dtype]
        keys, values = (normal(kv_heads, count + 3, head_dim, seed=10 * row + s).to(dtype) for s in (3, 4))
        mine = (keys.clone(), values.clone())
        caches.append((keys, values, mine))
        seat = (mine[0].data_ptr(), mine[1].data_ptr(), (count + 3) * head_dim * keys.element_size(), count)
        seats.append(seat)
        token = qkv[row].view(heads + 2 * kv_heads, head_dim)
        wanted.append(reference(shape, token, keys[:, :count], values[:, :count], angles[row], norms))
    places = [(cos[row].data_ptr(), sin[row].data_ptr()) for row in range(len(counts))]
    alone = attention(qkv, seats, places, 1)
    tolerance = KV_TOLERANCE[kv_dtype]
    torch.testing.assert_close(alone, torch.stack(wanted), rtol=tolerance, atol=tolerance)
    for keys, values, (my_keys, my_values) in caches:
        torch.testing.assert_close(my_keys, keys, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(my_values, values, rtol=tolerance, atol=tolerance)
    assert torch.equal(attention(qkv, seats, places, 2), alone)
    assert torch.equal(attention(qkv[3:4], seats[3:4], places[3:4], 1)[0], alone[3])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 2, 16), (8, 1, 256)])
def test_attention_over_kv_in_8_bits(heads: int, kv_heads: int, head_dim: int) -> None:
    """Keys and values are held to half a 127th of their largest feature, and what is held is what is seen."""
    shape = AttentionShape(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=0, kv_dtype="int8", scale=0.11, eps=None,
        softcap=2.0 if heads == 4 else None,
    )  # fmt: skip
    attention = DecodeAttention(shape, None, None)
    count = 40
    qkv = normal(count, (heads + 2 * kv_heads) * head_dim)
    held = torch.zeros(2, kv_heads, count + 3, head_dim + 4, dtype=torch.int8)
    qkv[5] = 0.0
    outs = []
    for row in range(count):
        seat = (held[0].data_ptr(), held[1].data_ptr(), held.stride(1), row + 1)
        outs.append(attention(qkv[row : row + 1], [seat], [(0, 0)], 1)[0])
    floats = held[..., :head_dim].float() * held[..., head_dim:].contiguous().view(torch.float32)
    wanted = qkv.view(count, -1, head_dim)[:, heads:].reshape(count, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
    step = wanted.abs().amax(-1, keepdim=True) / 127
    assert ((floats[:, :, :count] - wanted).abs() <= 0.501 * step).all()
    assert not held[:, :, count:].any()
    for row in (0, 5, 17, count - 1):
        token = qkv[row].view(-1, head_dim)
        keys, values = (half[:, : row + 1].clone() for half in floats)
        mine = torch.cat((token[:heads], keys[:, -1], values[:, -1]))
        none = torch.empty(0)
        torch.testing.assert_close(outs[row], reference(shape, mine, keys, values, none, None), rtol=2e-5, atol=2e-5)
