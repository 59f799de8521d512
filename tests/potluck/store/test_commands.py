"""`potluck pull | list | show | rm` as a user runs them: exit codes, what is on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.e2e.potluck_process import Done, run_here
from tests.support.shard.safetensors_folders import tensors, write_folder
from tests.support.shard.tiny_gguf import write_gguf


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"POTLUCK_HOME": str(tmp_path / "home"), "POTLUCK_RUNTIME": str(tmp_path / "run"), "COLUMNS": "200"}


def potluck(environment: dict[str, str], *arguments: str) -> Done:
    return run_here(*arguments, environment=environment)


def test_pull_list_show_remove(environment: dict[str, str], tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    pulled = potluck(environment, "pull", str(tmp_path / "tiny.gguf"), "--json")
    assert pulled.returncode == 0, pulled.stderr
    *events, last = map(json.loads, pulled.stdout.splitlines())
    assert {event["stage"] for event in events} == {"ingest"}
    assert events[-1]["done"] == events[-1]["total"]
    assert (last["name"], last["architecture"], last["layers"]) == ("tiny", "llama", 2)
    assert json.loads(potluck(environment, "list", "--json").stdout) == [last]

    shown = json.loads(potluck(environment, "show", "tiny", "--json").stdout)
    assert shown["tokenizer"] is True
    assert shown["chat_template"] is False
    assert shown["backends"] == ["torch", "mlx"]
    assert shown["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, head_dim, bytes
    assert shown["kv_bytes_per_token_8_bit"] == 2 * 2 * 2 * (16 + 4)  # A scale for each head and side.
    assert shown["kv_bytes_default_context"] == 256 * shown["kv_bytes_per_token"]

    assert (shown["torch_path"], shown["torch_path_reason"]) == ("fused", None)
    assert [(row["format"], row["kept"]) for row in shown["formats"]] == [("F32", "dense")]
    assert shown["formats_total"]["torch_bytes"] == shown["weights_bytes"] == shown["formats_total"]["file_bytes"] // 2
    assert shown["formats_total"]["mlx_bytes"] == shown["weights_bytes_mlx"]
    text = potluck(environment, "show", "tiny").stdout
    assert "torch path" in text and "fused" in text
    assert text.split("kept")[1].split()[0] == "F32"
    assert "--quantize 8" in text and "--quantize 4" in text
    assert shown["quantized_bytes"]["4"]["torch"] < shown["quantized_bytes"]["8"]["torch"] < shown["weights_bytes"]

    write_folder(tmp_path / "a-name-that-is-quite-long-for-a-column", tensors())
    potluck(environment, "pull", str(tmp_path / "a-name-that-is-quite-long-for-a-column"))
    table = potluck(environment | {"COLUMNS": "60"}, "list").stdout
    assert "a-name-that-is-quite-long-for-a-column" in table
    assert "tiny.gguf" in "".join(potluck(environment, "show", "tiny").stdout.split())

    removed = potluck(environment, "rm", "tiny")
    assert removed.returncode == 0
    assert "its files stay" in removed.stdout
    assert (tmp_path / "tiny.gguf").exists()


def test_errors_end_with_a_hint_and_exit_code_1(environment: dict[str, str]) -> None:
    for arguments in (["show", "nothing"], ["rm", "nothing"], ["pull", "nothing"], ["pull", "/no/such.gguf"]):
        done = potluck(environment, *arguments)
        assert done.returncode == 1
        assert done.stdout.strip() == ""
        assert "error: " in done.stderr
        assert "hint: " in done.stderr
    empty = potluck(environment, "list")
    assert empty.returncode == 0
    assert "potluck pull smollm2" in empty.stdout


@pytest.mark.parametrize(
    ("variable", "arguments"),
    [("POTLUCK_HOME", ["pull", "tiny.gguf"]), ("POTLUCK_HOME", ["up", "tiny.gguf"]), ("POTLUCK_RUNTIME", ["status"])],
)
def test_a_folder_that_cannot_be_made_is_named(
    environment: dict[str, str], tmp_path: Path, variable: str, arguments: list[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    arguments = [str(tmp_path / "tiny.gguf") if word == "tiny.gguf" else word for word in arguments]
    below_a_file = tmp_path / "tiny.gguf" / "folder"
    done = potluck(environment | {variable: str(below_a_file)}, *arguments)
    assert done.returncode == 1
    assert str(below_a_file) in done.stderr and variable in done.stderr and "Traceback" not in done.stderr
