"""Dummy weights: every model loads and runs with them, without one byte of its own, and is held in the same form."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from shard.formats.affine import AffineForm, quantize_rows
from shard.formats.checkpoint import DummyWeights
from shard.formats.spec import Backend
from shard.pieces.cut_files import make_piece_list
from shard.pieces.metadata import write_metadata_from_store
from shard.pieces.open import open_checkpoint, open_with_dummy_weights
from shard.pieces.piece_list import metadata_pieces
from shard.stage import StageSpec
from shard.worker.load import in_weights_form, load_shard
from shard.worker.profile.process import ProfileProcess
from shard.worker.profile.report import ProfileSettings
from tests.support.shard import tiny
from tests.support.shard.model_pieces import stored
from tests.support.shard.stage_runner import Runner, load_stage, run_step, tiny_spec
from transport.errors import BadCheckpoint
from transport.messages.ring import DType, Entry, SequenceId, WeightsForm


def skeleton_of(folder: Path, scratch: Path) -> Path:
    """The folder of a model whose weights are nowhere."""
    pieces = make_piece_list(folder, "tiny")
    store = stored(folder, scratch / "store", pieces, metadata_pieces(pieces).values())
    write_metadata_from_store(pieces, store, scratch / "skeleton")
    store.clear()
    return scratch / "skeleton"


@pytest.mark.parametrize(
    ("family", "runner"),
    [
        *((family, "library") for family in ("llama_tied", "qwen3_moe", "gpt_oss")),
        *((family, "fused") for family in ("llama", "gemma3_text", "phi3", "qwen3_moe")),
        *((family, "mlx") for family in ("llama", "gemma3_text", "qwen3_moe")),
    ],
)
def test_models_run_without_their_weights(family: str, runner: Runner, tmp_path: Path) -> None:
    if runner == "mlx":
        pytest.importorskip("mlx.core")
    checkpoint = open_with_dummy_weights(skeleton_of(tiny.save_tiny(family, 0, tmp_path / "model"), tmp_path))
    stages = [load_stage(checkpoint, tiny_spec(*cut), runner) for cut in ((0, 2), (2, 4))]  # type: ignore[arg-type]
    ids = tuple(range(3, 20))
    logits = run_step(stages, [Entry(SequenceId(1), 0, ids, len(ids))])
    assert np.isfinite(logits).all()
    # Not vanished in denormal numbers either, and each token has its own.
    assert 1e-3 < np.abs(logits).max() < 1e4
    assert len(np.unique(logits, axis=0)) == len(ids)


@pytest.mark.parametrize("weights", get_args(WeightsForm))
@pytest.mark.parametrize("backend", get_args(Backend))
def test_it_takes_the_memory_of_the_real_ones(weights: WeightsForm, backend: Backend, tmp_path: Path) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    real = tiny.quantized_checkpoint(tiny.tiny_model("llama", 0), tmp_path, bits=8)
    spec = StageSpec(
        first=0,
        last=4,
        num_layers=4,
        device="mlx" if backend == "mlx" else "cpu",
        compute_dtype="bfloat16",
        wire_dtype="bfloat16",
        next_dtype="bfloat16",
        context_tokens=64,
        kv_capacity_tokens=64,
        weights=weights,
    )
    made_up = DummyWeights(real)
    assert made_up.tensors == real.tensors
    loaded = [load_shard(one, spec, backend=backend) for one in (real, made_up)]
    assert loaded[0].weights_bytes == loaded[1].weights_bytes
    real.reads.clear()
    load_shard(made_up, spec, backend=backend)
    assert not real.reads


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_numbers_are_like_weights(bits: int, tmp_path: Path) -> None:
    real = tiny.memory_checkpoint(tiny.tiny_model("llama", 0), tmp_path)
    name = "model.layers.0.mlp.gate_proj.weight"
    real.arrays[name] = np.zeros((512, 256), np.float32)
    made_up = DummyWeights(real)
    dense = np.empty((512, 256), np.float32)
    made_up.read_into(name, dense, "float32")
    real.affine[name] = (AffineForm(bits=bits, group=32), quantize_rows(real.arrays[name], bits, 32))
    quantized = made_up.read_affine(name, 7, 500)
    assert quantized.q.max() == 2**bits - 1
    for values in (dense, quantized.dequantized()):
        assert values.std() == pytest.approx(1 / 16, rel=0.35)
        assert abs(values.mean()) < 0.005


def test_each_dtype_has_the_same_numbers(tmp_path: Path) -> None:
    made_up = DummyWeights(tiny.memory_checkpoint(tiny.tiny_model("llama", 0), tmp_path))
    read: dict[DType, np.ndarray] = {
        "float32": np.empty((128, 64), np.float32),
        "float16": np.empty((128, 64), np.float16),
        "bfloat16": np.empty((128, 64), np.uint16),
    }
    for dtype, out in read.items():
        made_up.read_into("lm_head.weight", out, dtype)
    np.testing.assert_allclose(read["float16"], read["float32"], rtol=1e-2, atol=1e-6)
    widened = (read["bfloat16"].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(widened, read["float32"], rtol=1e-2)
    rows = np.empty((5, 64), np.float32)
    made_up.read_rows("lm_head.weight", 3, rows, "float32")
    with pytest.raises(ValueError, match="rows"):
        made_up.read_rows("lm_head.weight", 125, rows, "float32")
    with pytest.raises(BadCheckpoint, match="no tensor"):
        made_up.read_into("x", rows, "float32")


def test_a_host_without_the_weights_measures_the_model(tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny.save_tiny("llama", 0, tmp_path / "model"), tmp_path)
    settings = ProfileSettings(backend="torch", device="cpu", dtype="float32", budget_s=0.2, dummy_weights=True)
    process = ProfileProcess(skeleton, settings, threads=1)
    try:
        report = process.report()
    finally:
        process.close()
    assert report.kinds == (0, 0, 0, 0)
    assert report.under_load_s > 0


def test_forms_are_those_of_the_files(tmp_path: Path) -> None:
    folder = tiny.save_tiny("llama", 0, tmp_path / "model")
    for weights in get_args(WeightsForm):
        assert (
            in_weights_form(open_with_dummy_weights(folder), weights).tensors
            == in_weights_form(open_checkpoint(folder), weights).tensors
        )
