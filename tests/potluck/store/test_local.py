"""Models used where they lie, names, and what `rm` takes away."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from potluck.store.store import Store
from shard.pieces.open import open_checkpoint
from tests.support.shard.safetensors_folders import tensors, write_folder
from tests.support.shard.tiny_gguf import HIDDEN, write_gguf
from transport.errors import BadCheckpoint, BadRequest, ModelNotFound, PotluckError


def test_a_folder_is_used_in_place_and_seen_anew_when_it_changes(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "My Model v2", tensors())
    model = store.pull(str(folder))
    assert (model.name, model.path, model.source) == ("My-Model-v2", folder, f"file:{folder}")
    assert store.resolve("My-Model-v2") == store.resolve(f"file:{folder}") == store.resolve(str(folder)) == model
    write_folder(folder, tensors(torch.bfloat16), max_position_embeddings=32)
    changed = store.resolve("My-Model-v2")
    assert (changed.spec.context_tokens, changed.spec.stored_dtype) == (32, "BF16")
    assert not list((store.root / "models").rglob("*.safetensors"))


def test_a_gguf_is_used_in_place_and_ingested_again_when_it_changes(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    model = store.pull(f"file:{file}")
    assert model.name == "tiny"
    before = (model.path / "index.json").stat().st_mtime_ns
    assert store.resolve("tiny") == model
    assert (model.path / "index.json").stat().st_mtime_ns == before, "ingested again for nothing"
    write_gguf(file, "qwen3")
    assert store.resolve("tiny").spec.architecture == "qwen3"
    assert open_checkpoint(model.path).spec.hidden_size == HIDDEN
    os.utime(file, ns=(1, 1))
    assert store.resolve("tiny").files[0].modified_ns == 1
    assert not list((store.root / "models").rglob("*.gguf"))


@pytest.mark.parametrize("kept", ["nothing", "an older version"])
def test_what_an_older_potluck_recorded_is_completed(store: Store, tmp_path: Path, kept: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q4_1)
    folder = write_folder(tmp_path / "folder", tensors())
    for source in (tmp_path / "tiny.gguf", folder):
        model = store.pull(str(source))
        manifest = store.root / "models" / model.name / "potluck.json"
        whole = manifest.read_text()
        data = json.loads(whole)
        if kept == "nothing":
            del data["spec"]["weights"]
        else:
            data["spec"]["weights"] |= {"version": 0, "embed": []}
        manifest.write_text(json.dumps(data))
        (listed,) = (one for one in Store(store.root).list() if one.name == model.name)
        assert not listed.spec.is_current
        assert store.resolve(model.name) == model
        assert manifest.read_text() == whole
        assert not list(manifest.parent.glob("*.new"))


def test_a_record_that_can_not_be_written_is_completed_all_the_same(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = store.pull(str(write_folder(tmp_path / "folder", tensors())))
    manifest = store.root / "models" / model.name / "potluck.json"
    data = json.loads(manifest.read_text())
    del data["spec"]["weights"]
    manifest.write_text(json.dumps(data))

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("potluck.store.store.write_manifest", refuse)
    assert store.resolve(model.name) == model


def test_two_models_of_one_name_are_two_models(store: Store, tmp_path: Path) -> None:
    first = store.pull(str(write_folder(tmp_path / "model", tensors())))
    (tmp_path / "other").mkdir()
    second = store.pull(str(write_folder(tmp_path / "other" / first.name, tensors())))
    assert second.name.startswith(f"{first.name}-")
    assert {model.name for model in store.list()} == {first.name, second.name}
    assert store.pull(second.source) == second


def test_a_file_of_the_demo_models_name_does_not_take_it(store: Store, tmp_path: Path) -> None:
    write_gguf(tmp_path / "smollm2.gguf")
    assert store.pull(str(tmp_path / "smollm2.gguf")).name.startswith("smollm2-")


def test_an_unknown_name_lists_what_is_there_and_how_to_pull(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="none is here yet") as raised:
        store.resolve("llama")
    assert raised.value.hint == "potluck pull smollm2"
    store.pull(str(write_folder(tmp_path / "mine", tensors())))
    with pytest.raises(ModelNotFound, match="mine"):
        store.show("llama")
    with pytest.raises(ModelNotFound) as raised:
        store.show("org/name")
    assert raised.value.hint == "potluck pull hf:org/name"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../b", "/etc/passwd", "a/b/c", ".hidden", "a\0b", "x" * 200])
def test_a_name_never_leads_out_of_the_store(store: Store, name: str) -> None:
    for action in (store.show, store.remove):
        with pytest.raises(ModelNotFound):
            action(name)
    with pytest.raises(PotluckError):
        store.pull(f"hf:{name}")
    with pytest.raises(PotluckError):
        store.pull(f"pypi:{name}")
    assert not store.root.exists()


def test_what_is_no_model_is_refused_with_a_hint(store: Store, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "ggufs").mkdir()
    write_gguf(tmp_path / "ggufs" / "tiny.gguf")
    cases: list[tuple[str, type[PotluckError], str]] = [
        (str(tmp_path / "nothing"), ModelNotFound, "nothing at"),
        (str(tmp_path / "notes.txt"), BadRequest, "expected a folder or"),
        (str(tmp_path / "ggufs"), BadRequest, "got GGUF files"),
        ("gpt-5", ModelNotFound, "must be an alias"),
        ("pypi:nameonly", BadRequest, "package and its version"),
        ("hf:nameonly", BadRequest, "repository"),
    ]
    for source, kind, words in cases:
        with pytest.raises(kind, match=words) as raised:
            store.pull(source)
        assert raised.value.hint
    assert store.list() == []
    assert not list(store.root.rglob(".building*"))


def test_a_truncated_gguf_leaves_nothing_in_the_store(store: Store, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    with (tmp_path / "tiny.gguf").open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(BadCheckpoint, match=r"tiny\.gguf"):
        store.pull(str(tmp_path / "tiny.gguf"))
    assert store.list() == []


def test_removing_forgets_and_leaves_files_that_were_not_downloaded(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", tensors())
    store.pull(str(folder))
    open_file = open_checkpoint(store.resolve("mine").path)
    store.remove("mine")
    assert store.list() == []
    assert open_file.tensors
    assert (folder / "model.safetensors").exists()
    with pytest.raises(ModelNotFound):
        store.remove("mine")


def test_files_that_went_are_told(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", tensors())
    store.pull(str(folder))
    folder.rename(tmp_path / "elsewhere")
    assert not store.show("mine").is_present
    with pytest.raises(ModelNotFound, match="nothing at"):
        store.resolve("mine")
    assert store.remove("mine").name == "mine"


def test_a_weights_file_that_went_is_told(store: Store, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = write_folder(tmp_path / "mine", tensors())
    for path, gone in ((tmp_path / "tiny.gguf", tmp_path / "tiny.gguf"), (folder, folder / "model.safetensors")):
        name = store.pull(str(path)).name
        assert store.show(name).is_present
        gone.unlink()
        assert not store.show(name).is_present
        with pytest.raises(PotluckError, match=path.name):
            store.resolve(name)


def test_a_broken_record_hides_no_other_model(store: Store, tmp_path: Path) -> None:
    first = store.pull(str(write_folder(tmp_path / "one", tensors())))
    store.pull(str(write_folder(tmp_path / "two", tensors())))
    (store.root / "models" / "two" / "potluck.json").write_text('{"version": 1')
    assert store.list() == [first]
    assert store.pull(str(tmp_path / "two")).name == "two"
    data = json.loads((store.root / "models" / "one" / "potluck.json").read_text())
    assert data["path"] == str(tmp_path / "one")
