"""A stage reads exactly the pieces that are listed for it, whatever the family, the files' format and the backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shard.formats.checkpoint import DenseView
from shard.formats.gguf.ingest import ingest_gguf
from shard.pieces.cut_files import make_piece_list
from shard.pieces.metadata import write_metadata_from_store
from shard.pieces.open import open_checkpoint
from shard.pieces.piece_list import metadata_pieces, stage_pieces
from tests.support.shard import tiny
from tests.support.shard.model_pieces import noted_reads, stored
from tests.support.shard.packed_folders import AWQ, GPTQ, awq, gptq, rounded
from tests.support.shard.stage_runner import Runner, load_stage, tiny_spec
from tests.support.shard.tiny_gguf import write_gguf
from transport.errors import BadCheckpoint

CUTS = ((0, 4), (0, 1), (1, 3), (3, 4))


def check(folder: Path, scratch: Path, runner: Runner, cuts: tuple[tuple[int, int], ...] = CUTS, **spec: Any) -> None:
    pieces = make_piece_list(folder, "tiny")
    total = [piece for file in pieces.files for piece in file.pieces]
    nameless = {piece.digest for piece in metadata_pieces(pieces).values()}
    for number, (first, last) in enumerate(cuts):
        root = scratch / str(number)
        store = stored(folder, root / "store", pieces, metadata_pieces(pieces).values())
        write_metadata_from_store(pieces, store, root / "skeleton")
        with_weights = open_checkpoint(root / "skeleton", pieces=store)
        needed = stage_pieces(pieces, with_weights.spec, first, last)
        assert all(total[index].digest == piece.digest for index, piece in needed.items())
        store = stored(folder, root / "more", pieces, needed.values())
        checkpoint = open_checkpoint(root / "skeleton", pieces=store)
        # Torch's kernels for packed weights take no tiny matrices.
        held = checkpoint if runner == "mlx" else DenseView(checkpoint)
        with noted_reads() as read:
            load_stage(held, tiny_spec(first, last, **spec), runner)  # type: ignore[arg-type]
        checkpoint.close()
        assert read | nameless == {piece.digest for piece in needed.values()}
        assert len(needed) < len(total) or (first, last) == cuts[0]


@pytest.mark.parametrize(
    ("family", "runner"),
    [
        *((family, "library") for family in tiny.FAMILIES),
        *((family, "fused") for family in ("llama_tied", "gemma3_text", "phi3", "qwen3_moe")),
        *((family, "mlx") for family in tiny.CORE_FAMILIES),
    ],
)
def test_of_a_hugging_face_folder(family: str, runner: Runner, tmp_path: Path) -> None:
    if runner == "mlx":
        pytest.importorskip("mlx.core")
    folder = tiny.save_tiny(family, 0, tmp_path / "model")
    check(folder, tmp_path / "scratch", runner)


@pytest.mark.parametrize("runner", ["fused", "mlx"])
def test_of_a_gguf(runner: Runner, tmp_path: Path) -> None:
    if runner == "mlx":
        pytest.importorskip("mlx.core")
    write_gguf(tmp_path / "one.gguf")
    (tmp_path / "model").mkdir()
    ingest_gguf(tmp_path / "one.gguf", tmp_path / "model", recorded_as=str(tmp_path / "one.gguf"))
    check(tmp_path / "model", tmp_path / "scratch", runner, ((0, 2), (0, 1), (1, 2)), num_layers=2)


@pytest.mark.parametrize("method", ["awq", "gptq", "gptq with fillers", "gptq in act-order"])
@pytest.mark.parametrize("runner", ["fused", "mlx"])
def test_of_packed_weights(method: str, runner: Runner, tmp_path: Path) -> None:
    if runner == "mlx":
        pytest.importorskip("mlx.core")
    model = tiny.tiny_model("llama", 0)
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if "_proj.weight" not in name:
            arrays[name] = values
            continue
        numbers = rounded(np.ascontiguousarray(values.T))
        parts = awq(*numbers) if method == "awq" else gptq(*numbers, 4)
        if "fillers" in method:
            parts["bias"] = np.zeros(len(values), np.float16)
        arrays |= {name.replace("weight", leaf): array for leaf, array in parts.items()}
    facts = (AWQ if method == "awq" else GPTQ | {"desc_act": "order" in method}) | {"group_size": 32}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": facts}))
    save_file(arrays, folder / "model.safetensors")
    check(folder, tmp_path / "scratch", runner)


def test_of_packed_mlx_weights(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from tests.support.shard.mlx_folders import written_by_mlx_lm

    tiny.save_tiny("qwen3_moe", 0, tmp_path / "original")
    written_by_mlx_lm("qwen3_moe", tmp_path / "original", tmp_path / "mlx")
    for runner in ("library", "mlx"):
        check(tmp_path / "mlx", tmp_path / runner, runner)  # type: ignore[arg-type]


def test_what_no_stage_loads_is_needed_by_none(tmp_path: Path) -> None:
    """Frequencies that the config says, layers beyond the last one, a head that is tied all the same."""
    folder = tiny.save_tiny("llama_tied", 0, tmp_path / "model")
    arrays = load_file(folder / "model.safetensors")
    draw = np.random.default_rng(0)
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": (8,),
        "model.layers.4.self_attn.q_proj.weight": (64, 64),
        "lm_head.weight": (128, 64),
        "model.rotary_emb.inv_freq": (8,),
    }
    arrays |= {name: draw.standard_normal(shape).astype(np.float32) for name, shape in extra.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    check(folder, tmp_path / "scratch", "library")
    pieces = make_piece_list(folder, "tiny")
    numbers = dict(enumerate(piece for file in pieces.files for piece in file.pieces))
    spec = open_checkpoint(folder).spec
    assert not {numbers[index].tensor for index in stage_pieces(pieces, spec, 0, 4)} & set(extra)


def test_a_piece_that_lacks_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    folder = tiny.save_tiny("llama", 0, tmp_path / "model")
    pieces = make_piece_list(folder, "tiny")
    spec = open_checkpoint(folder).spec
    needed = stage_pieces(pieces, spec, 1, 3)
    store = stored(folder, tmp_path / "store", pieces, needed.values())
    write_metadata_from_store(pieces, store, tmp_path / "skeleton")
    checkpoint = open_checkpoint(tmp_path / "skeleton", pieces=store)
    with pytest.raises(BadCheckpoint, match=r"layers\.3\.\S+ in .*piece [0-9a-f]{12} is not on this host"):
        load_stage(checkpoint, tiny_spec(1, 4), "fused")
    with pytest.raises(BadCheckpoint, match="in pieces"):
        open_checkpoint(tmp_path / "skeleton")
