"""Parts of the fused path by themselves: angles, norms, packing, the KV's short way in, tables of int4 devices."""

from __future__ import annotations

import pytest
import torch

from shard.formats.affine import AffineForm
from shard.torch_backend.fused.config import Rope
from shard.torch_backend.fused.ops import RmsNorm, rms_norm
from shard.torch_backend.fused.step import StepAngles, pack_rows
from shard.torch_backend.gpu.linear import Int4Linear
from shard.torch_backend.kv import ROLLBACK_TOKENS, LayerKV
from shard.torch_backend.linear import load_embedding_table, load_linear
from tests.support.shard.affine_matrices import AffineTensors, random_rows
from transport.messages.ring import Entry, SequenceId


def test_angles_of_a_step() -> None:
    rope = Rope(inverse_frequencies=torch.tensor([1.0, 0.01]), scaling=2.0)
    angles = StepAngles(rope, torch.tensor([3, 5000]), torch.float32)
    cos, sin = angles.pairs()
    assert torch.allclose(cos[1, 0, 0], 2 * torch.cos(torch.tensor([5000.0, 50.0])), atol=1e-5)
    assert torch.allclose(sin[0, 0, 0], -2 * torch.sin(torch.tensor([3.0, 0.03])), atol=1e-6)
    assert torch.equal(sin[:, 0, 0], -sin[:, 0, 1])
    assert torch.equal(cos[:, 0, 0], cos[:, 0, 1])


@pytest.mark.parametrize("window", [None, 5])
def test_one_token_is_appended_as_a_chunk_of_one(window: int | None) -> None:
    one, other = LayerKV(window), LayerKV(window)
    for position in range(3 * ROLLBACK_TOKENS):
        both = torch.randn(2, 2, 4)
        keys, values = one.append_one(position, both)
        wanted_keys, wanted_values, _ = other.append(position, both[0, :, None], both[1, :, None])
        assert torch.equal(keys[0], wanted_keys)
        assert torch.equal(values[0], wanted_values)
    assert one.num_bytes() == other.num_bytes()


def test_a_step_of_decodes_alone_is_packed_as_it_comes() -> None:
    entries = [Entry(SequenceId(7), 4, (1,), 1), Entry(SequenceId(2), 9, (3,), 1)]
    packing = pack_rows(entries)
    assert (packing.entries, packing.offsets) == (tuple(entries), (0, 1))
    assert (packing.ids.tolist(), packing.positions.tolist()) == ([1, 3], [4, 9])
    assert (packing.num_decode, packing.logit_rows.tolist()) == (2, [0, 1])
    assert packing.source_rows is packing.rows_in_order is packing.logits_in_order is None
    without_logits = pack_rows([*entries, Entry(SequenceId(3), 5, (6,), 0)])
    assert (without_logits.num_decode, without_logits.logit_rows.tolist()) == (3, [0, 1])


@pytest.mark.parametrize("window", [None, 5])
def test_a_seat_is_where_the_token_s_key_and_value_belong(window: int | None) -> None:
    layer, like = LayerKV(window), torch.empty(2, 1, 4)
    for position in range(3 * ROLLBACK_TOKENS):
        keys, values, head_bytes, count = layer.kv_slot(position, like)
        both = torch.full((2, 2, 4), float(position))
        seen_keys, seen_values = layer.append_one(position, both)
        assert (keys, values, count) == (seen_keys.data_ptr(), seen_values.data_ptr(), seen_keys.shape[2])
        assert head_bytes == seen_keys.stride(1) * 4


def test_decode_entries_are_packed_first() -> None:
    entries = [
        Entry(SequenceId(1), 4, (1, 2), 2),
        Entry(SequenceId(2), 9, (3,), 1),
        Entry(SequenceId(3), 0, (4, 5, 6), 0),
    ]
    packing = pack_rows(entries)
    assert packing.num_decode == 1
    assert packing.ids.tolist() == [3, 1, 2, 4, 5, 6]
    assert packing.positions.tolist() == [9, 4, 5, 0, 1, 2]
    assert packing.logit_rows.tolist() == [0, 1, 2]
    assert packing.rows_in_order is not None and packing.logits_in_order is not None
    assert packing.ids[packing.rows_in_order].tolist() == [1, 2, 3, 4, 5, 6]
    assert packing.logits_in_order.tolist() == [1, 2, 0]
    assert pack_rows(entries[1:]).rows_in_order is None


def test_norms_are_the_formula() -> None:
    x, weight = torch.randn(7, 96) * 3, torch.randn(96)
    wanted = x.double() * weight / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(rms_norm(x, RmsNorm(weight, 1e-3, width=96)).double(), wanted, rtol=1e-5, atol=1e-6)
    half = x.to(torch.bfloat16)
    assert rms_norm(half, RmsNorm(weight, 1e-3, width=96)).dtype == torch.bfloat16


def test_an_embedding_is_not_put_into_the_int4_kernel_s_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has the kernel, as CUDA and Metal do; `meta` stands in for it."""
    monkeypatch.setattr("shard.torch_backend.gpu.linear._has_int4", lambda *what: True)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda q, tiles: q, raising=False)
    rows = random_rows(64, 256, bits=4, group=32, seed=1)
    checkpoint = AffineTensors(forms={"w": AffineForm(bits=4, group=32)}, numbers={"w": rows})
    meta = torch.device("meta")
    projection = load_linear(checkpoint, ["w"], "bfloat16", meta)  # type: ignore[arg-type]
    assert isinstance(projection, Int4Linear)
    table = load_embedding_table(checkpoint, "w", "bfloat16", meta)  # type: ignore[arg-type]
    assert table.rows(torch.zeros(3, dtype=torch.long, device=meta)).shape == (3, 256)
