"""What `show` says of formats: every tensor once, what becomes of it, and sizes that are those of the whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from potluck.store.model_details import details_of, format_rows, rows_of
from potluck.store.store import Store
from shard.formats.affine import AffineForm
from shard.formats.checkpoint import TensorInfo, supported_form
from shard.formats.config import spec_from
from shard.formats.spec import ModelSpec
from tests.support.shard.tiny_gguf import write_gguf

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


class MadeUp:
    """A checkpoint of which only the facts are asked."""

    def __init__(self, **config: object) -> None:
        four, six = AffineForm(bits=4, group=32), AffineForm(bits=8, group=32, exact=False)
        infos = [
            TensorInfo(name="model.embed_tokens.weight", shape=(100, 64), format="Q6_K", file_bytes=5250, affine=six),
            TensorInfo(name="model.norm.weight", shape=(64,), format="F32", file_bytes=256),
            TensorInfo(name="lm_head.weight", shape=(100, 64), format="F32", file_bytes=25600),
            TensorInfo(
                name="model.layers.0.mlp.up_proj.weight", shape=(96, 64), format="Q4_0", file_bytes=3456, affine=four
            ),
            TensorInfo(
                name="model.layers.0.mlp.down_proj.weight", shape=(64, 96), format="Q4_0", file_bytes=3456, affine=four
            ),
            TensorInfo(name="model.layers.1.mlp.up_proj.weight", shape=(96, 64), format="Q4_0", file_bytes=3456),
        ]
        self.config = {**CONFIG, **config}
        self.tensors = {info.name: info for info in infos}

    @property
    def spec(self) -> ModelSpec:
        return spec_from(self.config, self.tensors, file_bytes=41474)


def test_each_format_is_told_apart_by_what_becomes_of_it() -> None:
    rows = rows_of(MadeUp(), "bfloat16")  # type: ignore[arg-type]
    assert [(row.format, row.kept, row.bits, row.num_tensors, row.file_bytes) for row in rows] == [
        ("F32", "not loaded", None, 1, 25600),  # The head is the embedding.
        ("Q4_0", "exactly", 4, 2, 6912),
        ("Q6_K", "anew", 8, 1, 5250),
        ("Q4_0", "not loaded", None, 1, 3456),  # A layer past the last one.
        ("F32", "dense", None, 1, 256),
    ]
    assert [row.torch_bytes for row in rows] == [0, 6144 + 384 * 4, 6400 + 200 * 4, 0, 128]


def test_totals_are_those_that_are_planned_with() -> None:
    for config in ({}, {"tie_word_embeddings": False}, {"model_type": "gpt_oss"}):
        checkpoint = MadeUp(**config)
        rows = rows_of(checkpoint, "bfloat16")  # type: ignore[arg-type]
        assert sum(row.num_tensors for row in rows) == len(checkpoint.tensors)
        assert sum(row.file_bytes for row in rows) == 41474
        held = supported_form("torch", checkpoint.config, "stored", stacked_experts=False)
        assert held == ("dense" if config.get("model_type") == "gpt_oss" else "stored")
        planned = checkpoint.spec.stage_weights_bytes(0, 1, "bfloat16", weights=held)
        assert sum(row.torch_bytes for row in rows) == planned
        planned = checkpoint.spec.stage_weights_bytes(0, 1, "bfloat16", backend="mlx")
        assert sum(row.mlx_bytes for row in rows) == planned


def test_without_its_files_a_model_has_facts_but_no_formats(store: Store, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    model = store.pull(str(tmp_path / "tiny.gguf"))
    assert details_of(model).library_reason is None
    (tmp_path / "tiny.gguf").unlink()
    assert format_rows(model, "bfloat16") is None
    gone = replace(model, path=tmp_path / "nowhere")
    assert details_of(gone).library_reason is None
    other = replace(gone, spec=replace(gone.spec, architecture="gpt_oss"))
    assert "gpt_oss" in (details_of(other).library_reason or "")
