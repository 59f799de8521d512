"""Random quantized checkpoints are what our reader reads, and the bench's small form ends with its facts in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.stage import random_checkpoint
from bench.stage.loading import TARGETS, measure, parse_status, parts_of
from bench.stage.random_checkpoint import LlamaShape, forget_pages, write_quantized
from bench.targets import judge_targets
from shard.pieces.open import open_checkpoint

SMALL = LlamaShape(hidden=256, intermediate=512, layers=2, heads=2, kv_heads=1, vocab=512, tied=True)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_weights_have_the_variance_of_a_model(
    tmp_path: Path, bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Scales may well be in another file than their weights.
    monkeypatch.setattr(random_checkpoint, "_FILE_BYTES", 1000)
    folder = write_quantized(SMALL, tmp_path / "model", bits=bits, group=group)
    assert len(list(folder.glob("*.safetensors"))) > 10
    forget_pages(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.num_layers == 2
    info = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    assert info.affine is not None and (info.affine.bits, info.affine.group) == (bits, group)
    weight = np.empty(info.shape, np.float32)
    checkpoint.read_into(info.name, weight, "float32")
    assert weight.std() == pytest.approx(512**-0.5, rel=0.1)
    assert abs(weight.mean()) < 0.01 * weight.std() + 0.002
    norm = np.empty(256, np.float32)
    checkpoint.read_into("model.norm.weight", norm, "float32")
    assert (norm == 1.0).all()


def test_a_small_model_goes_through_the_whole_bench(tmp_path: Path) -> None:
    found = measure(SMALL, tmp_path, bits=4, group=64, threads=1, rounds=1)
    stage_bytes = found["stage_bytes"]
    assert isinstance(stage_bytes, int) and 0.5e6 < stage_bytes < 2e6
    profile = found["one_thread_load"]
    assert isinstance(profile, dict)
    shares = profile["shares"]
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.01)
    # What the profile looks for is still called so in the loader.
    assert all(shares[part] > 0 for part in ("reading files", "unpacking bits", "packing for the kernels"))


def test_shares_and_verdicts() -> None:
    found = parts_of({"read_exactly": 1.0, "pack_rows": 2.0, "numpy": 9.0}, 4.0)
    assert found["shares"]["packing for the kernels"] == 0.5
    assert found["shares"]["other"] == 0.25
    assert [row["met"] for row in judge_targets([{"peak over stage": 1.2, "share of bandwidth": 0.6}], TARGETS)] == [
        False,
        True,
    ]


def test_status_fields_are_in_kibibytes() -> None:
    assert parse_status("Name:\tx\nVmHWM:\t  12 kB\n", "VmHWM") == 12288
    with pytest.raises(RuntimeError):
        parse_status("Name:\tx\n", "VmHWM")
