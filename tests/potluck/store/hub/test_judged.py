"""Headers tell what a hub's files are: what is no use, or has no room, is refused before it comes."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from potluck.store.disk import MARGIN_BYTES
from potluck.store.store import Store
from shard.pieces.open import open_checkpoint
from tests.support.shard import packed_folders
from tests.support.shard.safetensors_folders import CONFIG, tensors, write_folder, write_parts
from tests.support.shard.tiny_gguf import write_gguf
from tests.support.store.hub_checks import SOURCE, WEIGHTS, assert_right, incomplete, size_of
from tests.support.store.hub_server import FakeHub
from transport.errors import BadCheckpoint, NoSpace, PotluckError, UnsupportedModel


def test_only_the_files_of_the_index_come(hub: FakeHub, repository: Path, store: Store) -> None:
    (repository / WEIGHTS).unlink()
    write_parts(repository, tensors())
    save_file({"x": torch.zeros(9)}, repository / "consolidated.safetensors")
    save_file({"x": torch.zeros(9)}, repository / "adapter_model.safetensors")
    (repository / "original").mkdir()
    save_file({"x": torch.zeros(9)}, repository / "original" / "model.safetensors")
    (repository / "tokenizer.json").write_text("{}")
    path = store.pull(SOURCE).path
    names = sorted(file.name for file in path.iterdir())
    assert names == [
        "config.json",
        *(f"model-{part:05}-of-00005.safetensors" for part in range(1, 6)),
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert open_checkpoint(path).tensors


def test_files_of_nothing_that_stages_load_do_not_come(hub: FakeHub, repository: Path, store: Store) -> None:
    (repository / WEIGHTS).unlink()
    write_parts(repository, tensors() | {"vision_tower.blocks.0.weight": torch.zeros(99, 9)})
    path = store.pull(SOURCE).path
    assert not hub.asked("model-00006-of-00006.safetensors")
    assert len(list(path.glob("*.safetensors"))) == 5
    with closing(open_checkpoint(path)) as checkpoint:
        assert checkpoint.tensors.keys() == tensors().keys()
    with closing(open_checkpoint(repository)) as checkpoint:
        assert checkpoint.tensors.keys() == tensors().keys()


@pytest.mark.parametrize("form", ["MLX", "GPTQ", "AWQ"])
def test_quantized_folders_are_judged_by_their_headers_too(
    hub: FakeHub, repository: Path, store: Store, form: str
) -> None:
    if form == "MLX":
        draw = np.random.default_rng(0)
        parts: dict[str, np.ndarray] = {"model.norm.weight": np.ones(32, np.float16)}
        names = ("model.embed_tokens", *(f"model.layers.{layer}.mlp.up_proj" for layer in range(2)))
        for name in names:
            parts[f"{name}.weight"] = draw.integers(0, 2**32, (16, 4), np.uint32)
            parts |= {f"{name}.{leaf}": np.ones((16, 1), np.float16) for leaf in ("scales", "biases")}
        facts = CONFIG | {"hidden_size": 32, "quantization": {"bits": 4, "group_size": 32}, "tie_word_embeddings": True}
        (repository / "config.json").write_text(json.dumps(facts))
        save_arrays(parts, repository / WEIGHTS)
    else:
        numbers = packed_folders.draw(4, 128)
        quantized = packed_folders.awq(*numbers) if form == "AWQ" else packed_folders.gptq(*numbers, 4)
        if form == "GPTQ":
            quantized["bias"] = np.zeros(quantized["qweight"].shape[1], np.float16)
        packed_folders.write(repository, quantized, getattr(packed_folders, form))
    model = store.pull(SOURCE)
    assert_right(model.path, repository)
    with closing(open_checkpoint(model.path)) as checkpoint:
        assert any(info.format.startswith(form) for info in checkpoint.tensors.values())
    assert hub.file_bytes == size_of(*repository.iterdir())


def _odd(repository: Path, what: str) -> None:
    weights = tensors()
    if what == "architecture":
        (repository / "config.json").write_text(json.dumps(CONFIG | {"model_type": "rwkv7"}))
    elif what == "vision":
        (repository / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": CONFIG}))
    elif what == "pickled":
        (repository / WEIGHTS).rename(repository / "pytorch_model.bin")
    elif what == "no config":
        (repository / "config.json").unlink()
        write_gguf(repository / "tiny.gguf")
    elif what == "shape":
        write_folder(repository, weights | {"model.embed_tokens.weight": torch.zeros(11, 7)})
    elif what == "a layer":
        write_folder(repository, weights, num_hidden_layers=3)
    elif what == "dtype":
        write_folder(repository, weights, quantization_config={"quant_method": "unheard-of"})
    elif what == "header":
        data = (repository / WEIGHTS).read_bytes()
        (repository / WEIGHTS).write_bytes(b"\xff" * 8 + data[8:])
    elif what == "cut":
        data = (repository / WEIGHTS).read_bytes()
        (repository / WEIGHTS).write_bytes(data[:-8])
    elif what == "index":
        (repository / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
        )


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("architecture", UnsupportedModel, "rwkv7"),
        ("vision", UnsupportedModel, "several parts"),
        ("pickled", UnsupportedModel, "pickled"),
        ("no config", UnsupportedModel, r"no config\.json"),
        ("shape", BadCheckpoint, "hidden_size"),
        ("a layer", BadCheckpoint, "layer 2"),
        ("dtype", UnsupportedModel, "unheard-of"),
        ("header", BadCheckpoint, r"org/name: model\.safetensors is truncated or not a safetensors file"),
        ("cut", BadCheckpoint, "ends at byte"),
        ("index", BadCheckpoint, "lacks"),
    ],
)
def test_what_can_not_be_used_is_refused_before_its_weights_come(
    hub: FakeHub, repository: Path, store: Store, what: str, kind: type[PotluckError], words: str, tmp_path: Path
) -> None:
    _odd(repository, what)
    with pytest.raises(kind, match=words) as raised:
        store.pull(SOURCE)
    assert "org/name" in raised.value.message and str(tmp_path) not in raised.value.message
    assert raised.value.hint
    assert hub.file_bytes <= (1 << 16) + 10_000
    assert store.list() == []
    assert not incomplete(tmp_path)
    if what == "no config":
        assert raised.value.hint == "name one of its GGUF files: hf:org/name/tiny.gguf"


def test_a_disk_without_room_is_told_before_the_weights_come(
    hub: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=MARGIN_BYTES + 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(NoSpace, match=r"hf:org/name needs \d+ MB") as raised:
        store.pull(SOURCE)
    assert "HF_HOME" in raised.value.hint
    assert hub.file_bytes <= (1 << 16) + 10_000
    assert not incomplete(tmp_path)
