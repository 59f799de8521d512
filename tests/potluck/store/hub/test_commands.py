"""Pulls from a hub on this machine in processes of their own, as the environment says; the real client beside ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shard.safetensors_folders import tensors, write_folder
from tests.support.shard.tiny_gguf import write_gguf
from tests.support.store.hub_server import COMMIT, TOKEN, FakeHub, serve_hub

SCRIPT = """
import sys
from pathlib import Path
from potluck.store.store import Store
from transport.errors import PotluckError
store = Store(Path(sys.argv[1]))
try:
    if sys.argv[2] == "rm":
        print(store.remove(sys.argv[3]).name)
    else:
        seen = []
        model = store.pull(sys.argv[3], seen.append)
        print(model.name, model.path, model.num_bytes, max(event.done for event in seen if event.stage == "download"))
except PotluckError as error:
    print(type(error).__name__, error)
"""
REAL_CLIENT = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("org/name", allow_patterns=["*.json", "*.safetensors"]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = write_folder(tmp_path / "repository", tensors())
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    write_gguf(folder / "tiny.gguf")
    with serve_hub(folder) as hub:
        yield hub


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    hf = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return hf | {"HF_TOKEN": TOKEN}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def act(environment: dict[str, str], root: Path, verb: str, name: str) -> str:
    return run(environment, SCRIPT, str(root), verb, name)


def test_a_repository_is_pulled_used_offline_and_removed(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    name, path, num_bytes, _ = act(environment, tmp_path / "home", "pull", "hf:org/name").split()
    assert name == "org/name"
    present = sorted(file.name for file in Path(path).iterdir())
    assert present == ["config.json", "model.safetensors"], "pickles and other forms are left where they are"
    assert hub.file_bytes == int(num_bytes) == sum(file.stat().st_size for file in Path(path).iterdir())
    asked = len(hub.requests)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert act(offline, tmp_path / "another", "pull", "hf:org/name").startswith(f"org/name {path}")
    assert len(hub.requests) == asked
    assert act(environment, tmp_path / "home", "rm", "org/name") == "org/name"
    assert not Path(path).exists()


def test_the_hubs_own_client_uses_what_was_pulled_and_the_other_way_round(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    path = act(environment, tmp_path / "home", "pull", "hf:org/name").split()[1]
    for way in (environment, environment | {"HF_HUB_OFFLINE": "1"}):
        fetched = hub.file_bytes
        assert run(way, REAL_CLIENT) == path
        assert hub.file_bytes == fetched, "it downloaded again"
    other = environment | {"HF_HOME": str(tmp_path / "other")}
    path = run(other, REAL_CLIENT)
    fetched = hub.file_bytes
    assert act(other, tmp_path / "another", "pull", "hf:org/name").split()[1] == path
    assert hub.file_bytes == fetched, "we downloaded again"


def test_one_gguf_of_a_repository_is_pulled(hub: FakeHub, environment: dict[str, str], tmp_path: Path) -> None:
    name, path, *_ = act(environment, tmp_path / "home", "pull", f"hf:org/name/tiny.gguf@{COMMIT}").split()
    assert name == "org/tiny"
    assert (Path(path) / "tokenizer.json").is_file()
    assert not hub.asked("model.safetensors")
    assert act(environment, tmp_path / "home", "rm", "org/tiny") == "org/tiny"
    assert not [file for file in (tmp_path / "hf").rglob("*.gguf") if file.exists()]


def test_what_the_hub_does_not_have_or_cant_say_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    def pull(source: str, **settings: str) -> str:
        return act(environment | settings, tmp_path / "home", "pull", source)

    assert pull("hf:org/other").startswith("ModelNotFound the hub has no org/other")
    assert pull("hf:org/name@v2").startswith("ModelNotFound the hub has no org/name@v2")
    assert pull("hf:org/name/no.gguf").startswith("ModelNotFound org/name has no file")
    answer = pull("hf:org/name", HF_HUB_OFFLINE="1")
    assert answer.startswith(
        "DownloadFailed hf:org/name can't be pulled offline: its config.json is not in the hub's cache"
    )
    assert "HF_HUB_OFFLINE" in answer
    answer = pull("hf:org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert answer.startswith("DownloadFailed")
    assert "check the network and HF_ENDPOINT" in answer


def test_the_command_says_what_comes_and_keeps_to_this_host_when_told(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    def pull(home: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "potluck", "pull", "hf:org/name", *options]
        own = {"POTLUCK_HOME": str(tmp_path / home), "POTLUCK_RUNTIME": str(tmp_path / "run")}
        return subprocess.run(
            command, env=os.environ | environment | own, capture_output=True, text=True, timeout=240, check=False
        )

    refused = pull("home", "--offline")
    assert refused.returncode == 1
    assert "can't be pulled offline" in refused.stderr and "hint: pull it once with a network" in refused.stderr
    assert not hub.requests
    done = pull("home")
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "repository" / "model.safetensors").stat().st_size
    assert f"hf:org/name: 1 file of weights, {size / 1e6:.1f} MB; {size / 1e6:.1f} MB to fetch" in done.stderr
    asked = len(hub.requests)
    done = pull("another", "--offline", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["name"] == "org/name"
    assert len(hub.requests) == asked
