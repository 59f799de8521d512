"""The native attention of prompts: what torch gives, the same bits however a prompt is cut, no look beyond what is
held."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from shard.torch_backend.cpu.compile import host_has_bfloat_dots
from shard.torch_backend.cpu.heads import AttentionShape, BFloatProducts, FloatProducts, Products
from shard.torch_backend.cpu.prefill_attention import PrefillAttention, SlotMapping, best_products
from shard.torch_backend.tensors import TORCH_DTYPES
from tests.support.shard.random_tensors import normal, turned
from transport.messages.ring import DType

BFLOATS, INT8_BFLOATS = (
    pytest.param(
        dtype,
        BFloatProducts(),
        marks=pytest.mark.skipif(not host_has_bfloat_dots(), reason="this processor has no products of bfloat16"),
        id=f"{dtype}-pairs",
    )
    for dtype in ("bfloat16", "int8")
)
KINDS = [
    *(pytest.param(dtype, FloatProducts(), id=dtype) for dtype in ("float32", "bfloat16", "float16", "int8")),
    BFLOATS,
    INT8_BFLOATS,
]
SHAPES = [(9, 3, 64), (4, 4, 32), (8, 1, 256), (10, 2, 96)]


def shape_of(heads: int, kv_heads: int, head_dim: int, dtype: DType, *, plain: bool = False) -> AttentionShape:
    """`plain`: nothing is normed or turned."""
    return AttentionShape(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=0 if plain else 32, kv_dtype=dtype, scale=0.11,
        eps=1e-5 if heads == 8 and not plain else None, softcap=1.5 if heads == 10 else None,
    )  # fmt: skip


def nothing_held(shape: AttentionShape, positions: int) -> torch.Tensor:
    """KV [2, kv_heads, positions, row] of what is no number: of int8, by its scales."""
    if shape.kv_dtype != "int8":
        size = (2, shape.kv_heads, positions, shape.head_dim)
        return torch.full(size, float("nan"), dtype=TORCH_DTYPES[shape.kv_dtype])
    rows = torch.full((2, shape.kv_heads, positions, shape.kv_row_bytes), 77, dtype=torch.int8)
    rows[..., shape.head_dim :] = torch.tensor([float("nan")]).view(torch.int8)
    return rows


def floats_of(shape: AttentionShape, kv: torch.Tensor) -> torch.Tensor:
    if shape.kv_dtype != "int8":
        return kv.float()
    scales = kv[..., shape.head_dim :].contiguous().view(torch.float32)
    return kv[..., : shape.head_dim].float() * scales


class Prompt:
    """A made-up prompt in one layer: its projections, angles and KV, of which positions from `first` on are held and
    surrounded by what is no number."""

    def __init__(self, shape: AttentionShape, length: int, *, first: int = 0, seed: int = 0) -> None:
        self.shape, self.length, self.first = shape, length, first
        self.qkv = normal(length, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, seed=seed)
        angles = normal(length, shape.rotary // 2, seed=seed + 1)
        self.angles, self.cos, self.sin = angles, angles.cos(), angles.sin()
        self.norms = None
        if shape.eps is not None:
            self.norms = (normal(shape.head_dim, seed=seed + 2), normal(shape.head_dim, seed=seed + 3))
        self.kv = nothing_held(shape, length - first + 40)

    def attention(self, products: Products, window: int | None) -> PrefillAttention:
        return PrefillAttention(self.shape, products, window, *(self.norms or (None, None)))

    def seat(self, row: int, start: int, end: int) -> SlotMapping:
        """Of tokens [start, end), as rows from `row`."""
        keys, values = (half[:, 20:].data_ptr() for half in self.kv)
        return (row, end - start, keys, values, self.kv.stride(1) * self.kv.element_size(), self.first, start)

    def run(self, attention: PrefillAttention, start: int, end: int, threads: int = 1) -> torch.Tensor:
        angles = (self.cos[start:end].data_ptr(), self.sin[start:end].data_ptr())
        return attention(self.qkv[start:end], [self.seat(0, start, end)], angles, threads)

    def in_chunks(self, attention: PrefillAttention, bounds: Sequence[int]) -> torch.Tensor:
        return torch.cat([self.run(attention, start, end) for start, end in pairwise(bounds)])

    def reference(self, window: int | None) -> torch.Tensor:
        """All tokens, over keys and values as they are held after a run."""
        shape, length = self.shape, self.length
        heads = self.qkv.view(length, -1, shape.head_dim)[:, : shape.heads]
        if self.norms is not None and shape.eps is not None:
            heads = functional.rms_norm(heads, (shape.head_dim,), self.norms[0], shape.eps)
        heads = torch.stack([turned(one, angle) for one, angle in zip(heads, self.angles, strict=True)])
        keys, values = floats_of(shape, self.kv[:, :, 20 : 20 + length])
        behind = torch.arange(length)[:, None] - torch.arange(length)
        mask = (behind >= 0) & (behind < (window or length))
        grouped = heads.transpose(0, 1).reshape(shape.kv_heads, -1, length, shape.head_dim)
        scores = torch.einsum("hgtd,hpd->hgtp", grouped, keys) * shape.scale
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        attended = torch.einsum("hgtp,hpd->hgtd", weights, values).reshape(shape.heads, length, shape.head_dim)
        return attended.transpose(0, 1).reshape(length, -1)


@pytest.mark.parametrize(("dtype", "products"), KINDS)
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_it_is_torch_s(
    heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: DType, products: Products
) -> None:
    prompt = Prompt(shape_of(heads, kv_heads, head_dim, dtype), 300)
    attention = prompt.attention(products, window)
    got = prompt.run(attention, 0, 300)
    wanted = prompt.reference(window)
    # Keys and values are what they are: only the arithmetic differs.
    error = float((got - wanted).norm() / wanted.norm())
    assert error < (4e-3 if products.per_word == 2 else 2e-6)
    held = prompt.kv[:, :, 20:320].clone()
    assert torch.equal(prompt.run(attention, 0, 300, threads=2), got)
    assert torch.equal(prompt.kv[:, :, 20:320], held)
    untouched = floats_of(prompt.shape, nothing_held(prompt.shape, 340))
    for span in (slice(20), slice(320, None)):
        assert torch.equal(floats_of(prompt.shape, prompt.kv[:, :, span]).isnan(), untouched[:, :, span].isnan())


@pytest.mark.parametrize(("dtype", "products"), [KINDS[0], BFLOATS, INT8_BFLOATS])
@pytest.mark.parametrize("window", [None, 3, 40, 257])
def test_a_token_does_not_know_its_chunk(window: int | None, dtype: DType, products: Products) -> None:
    prompt = Prompt(shape_of(9, 3, 64, dtype), 600)
    attention = prompt.attention(products, window)
    whole = prompt.run(attention, 0, 600)
    for bounds in ((0, 1, 2, 4, 7, 300, 599, 600), (0, 255, 256, 258, 513, 600), range(0, 601, 25)):
        assert torch.equal(prompt.in_chunks(attention, bounds), whole), bounds


def test_what_a_window_has_dropped_makes_no_difference() -> None:
    """Rows before the first that is held are never read, and where the KV begins moves no sum."""
    shape = shape_of(9, 3, 64, "float32")
    whole = Prompt(shape, 400)
    attention = whole.attention(FloatProducts(), 30)
    wanted = whole.run(attention, 0, 400)[390:]
    for first in (361, 350, 317):
        part = Prompt(shape, 400, first=first)
        part.kv[:, :, 20 : 420 - first] = whole.kv[:, :, 20 + first : 420]
        assert torch.equal(part.run(attention, 390, 400), wanted)


def test_runs_of_several_sequences_are_one_call() -> None:
    shape = shape_of(9, 3, 64, "float32", plain=True)
    prompts = [Prompt(shape, length, seed=length) for length in (1, 40, 7, 130)]
    attention = prompts[0].attention(FloatProducts(), None)
    alone = [prompt.run(attention, 0, prompt.length) for prompt in prompts]
    seats, row = [], 0
    for prompt in prompts:
        prompt.kv.fill_(float("nan"))
        seats.append(prompt.seat(row, 0, prompt.length))
        row += prompt.length
    for threads in (1, 2):
        together = attention(torch.cat([prompt.qkv for prompt in prompts]), seats, (0, 0), threads)
        assert torch.equal(together, torch.cat(alone))


def test_what_is_no_number_shows() -> None:
    prompt = Prompt(shape_of(9, 3, 64, "float32", plain=True), 40)
    prompt.qkv[20] = float("nan")
    got = prompt.run(prompt.attention(FloatProducts(), None), 0, 40)
    assert got[20:].isnan().all()


def test_the_best_products_are_chosen_by_the_shape() -> None:
    bfloat = shape_of(9, 3, 64, "bfloat16")
    found = best_products(bfloat, exact=False)
    assert found is not None and found.per_word == (2 if host_has_bfloat_dots() else 1)
    assert isinstance(best_products(shape_of(9, 3, 64, "float32"), exact=False), FloatProducts)
    assert isinstance(best_products(shape_of(9, 3, 48, "bfloat16"), exact=False), FloatProducts)
    assert isinstance(best_products(shape_of(9, 3, 64, "int8"), exact=True), FloatProducts)
    assert best_products(shape_of(9, 3, 40, "bfloat16"), exact=False) is None
