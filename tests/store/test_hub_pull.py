"""What goes wrong between a hub and a disk: cut connections, kills, wrong bytes, refusals; and what is not fetched."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from potluck.store import PullProgress, Store
from potluck.store.disk import MARGIN_BYTES
from potluck.store.hub_files import Hub
from potluck.store.segments import here_bytes
from shard.open import open_checkpoint
from tests.shard import test_awq_gptq
from tests.shard.test_safetensors import CONFIG, tensors, write_folder, write_parts
from tests.shard.tiny_gguf import write_gguf
from tests.store.hub_server import REPOSITORY, TOKEN, FakeHub, checksum_of, serve_hub
from transport.errors import BadCheckpoint, DownloadFailed, ModelNotFound, NoSpace, PotluckError, UnsupportedModel

SOURCE = f"hf:{REPOSITORY}"
SEGMENT_BYTES = 64 << 10
WEIGHTS = "model.safetensors"
PULL = (
    "import sys; from pathlib import Path; from potluck.store import Store; import potluck.store.fetch as fetch; "
    + (
        f"fetch.SEGMENT_BYTES = {SEGMENT_BYTES}; "
        "print(Store(Path(sys.argv[1])).pull(sys.argv[2], lambda p: print(p.stage, p.done, flush=True)).path)"
    )
)


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may look up a name or leave this machine."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"a connection to {address}"
        connect(self, address)

    def refused(host: str, *arguments: Any, **options: Any) -> Any:
        assert host == "127.0.0.1", f"a look-up of {host}"
        return look_up(host, *arguments, **options)

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    large = {"model.layers.0.mlp.gate_proj.weight": torch.randn((50_000, 8), generator=draw)}
    return write_folder(tmp_path / "repository", tensors() | large)


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("potluck.store.fetch.SEGMENT_BYTES", SEGMENT_BYTES)
    monkeypatch.setattr("potluck.store.fetch.WAITS_S", (0.01, 0.01))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve_hub(repository) as hub:
        monkeypatch.setattr(Hub, "of_environment", lambda: Hub(endpoint=hub.url, cache=tmp_path / "cache"))
        yield hub


def size_of(*paths: Path) -> int:
    return sum(path.stat().st_size for path in paths)


def incomplete(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.incomplete"))


def assert_right(path: Path, repository: Path) -> None:
    for file in repository.iterdir():
        if file.suffix in (".json", ".safetensors"):
            assert (path / file.name).read_bytes() == file.read_bytes()
    with closing(open_checkpoint(path)) as checkpoint:
        assert checkpoint.tensors


def test_each_byte_comes_once_in_parallel_ranges_without_the_token_at_the_cdn(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path
) -> None:
    events: list[PullProgress] = []
    model = store.pull(SOURCE, events.append)
    assert_right(model.path, repository)
    assert hub.file_bytes == size_of(*repository.iterdir())
    ranges = {request.range for request in hub.asked(WEIGHTS)}
    assert len(ranges) >= 7 and None not in ranges
    assert {request.has_token for request in hub.requests if request.host == hub.url} == {True}
    assert {request.has_token for request in hub.requests if request.host == hub.cdn_url} == {False}
    assert not incomplete(tmp_path)
    (said,) = [event for event in events if event.says]
    assert said.says == f"{SOURCE}: 1 file of weights, 1.6 MB; 1.6 MB to fetch"
    weights = [event for event in events[events.index(said) :] if event.stage == "download"]
    assert [event.done for event in weights] == sorted(event.done for event in weights)
    assert weights[-1].done == weights[-1].total == size_of(repository / WEIGHTS)
    hub.requests.clear()
    assert store.pull(SOURCE) == model
    assert Store(tmp_path / "another").pull(SOURCE).path == model.path
    assert hub.file_bytes == 0


@pytest.mark.parametrize("seed", range(4))
def test_cut_at_random_points_it_ends_right_and_nothing_that_came_comes_again(
    hub: FakeHub, repository: Path, store: Store, seed: int
) -> None:
    draw = random.Random(seed)
    hub.cuts = [draw.randrange(1, SEGMENT_BYTES) for _ in range(draw.randrange(1, 12))]
    assert_right(store.pull(SOURCE).path, repository)
    assert hub.file_bytes == size_of(*repository.iterdir())


def test_a_pull_that_gave_up_is_continued_by_the_next(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path
) -> None:
    hub.cuts = [1 << 16] * 9 + [10_000] * 3 + [0] * 100
    with pytest.raises(DownloadFailed, match=r"model\.safetensors failed: .*what came is kept") as raised:
        store.pull(SOURCE)
    assert "continues" in raised.value.hint
    assert store.list() == []
    assert incomplete(tmp_path)
    hub.cuts = []
    assert_right(store.pull(SOURCE).path, repository)
    assert hub.file_bytes == size_of(*repository.iterdir())
    assert not incomplete(tmp_path)


def test_killed_at_any_time_it_goes_on(hub: FakeHub, repository: Path, store: Store, tmp_path: Path) -> None:
    hub.delay_s = 0.3
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", PULL, str(store.root), SOURCE]
    size = size_of(repository / WEIGHTS)
    partial = (
        tmp_path / "cache" / "models--org--name" / "blobs" / f"{checksum_of(repository / WEIGHTS)}.potluck.incomplete"
    )
    for at_least in (100_000, 700_000):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while here_bytes(partial, size, SEGMENT_BYTES) < at_least:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    hub.delay_s = 0
    kept = here_bytes(partial, size, SEGMENT_BYTES)
    hub.requests.clear()
    assert_right(store.pull(SOURCE).path, repository)
    assert hub.file_bytes == size - kept
    assert not incomplete(tmp_path)


def test_a_server_without_ranges_is_read_whole(hub: FakeHub, repository: Path, store: Store) -> None:
    hub.has_ranges = False
    hub.cuts = [1 << 20, 1_200_000]
    assert_right(store.pull(SOURCE).path, repository)


def test_wrong_bytes_are_named_and_removed(hub: FakeHub, repository: Path, store: Store, tmp_path: Path) -> None:
    hub.wrong = {WEIGHTS}
    with pytest.raises(DownloadFailed, match=r"org/name: model\.safetensors has the wrong checksum") as raised:
        store.pull(SOURCE)
    assert checksum_of(repository / WEIGHTS) in raised.value.message
    assert not incomplete(tmp_path)
    assert store.list() == []
    shutil.rmtree(tmp_path / "cache")
    hub.wrong = {"config.json"}
    with pytest.raises(DownloadFailed, match=r"config\.json has the wrong checksum"):
        store.pull(SOURCE)
    hub.wrong = set()
    assert_right(store.pull(SOURCE).path, repository)


def test_busy_servers_are_asked_again(hub: FakeHub, repository: Path, store: Store) -> None:
    hub.statuses = [503, 429]
    assert_right(store.pull(SOURCE).path, repository)


def test_refusals_are_told(hub: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], str, type[PotluckError], str]] = [
        ({"is_gated": True}, SOURCE, DownloadFailed, "is gated"),
        ({"is_private": True}, SOURCE, ModelNotFound, "the hub has no org/name"),
        ({}, f"{SOURCE}@v2", ModelNotFound, "the hub has no org/name@v2"),
        ({}, "hf:org/other", ModelNotFound, "the hub has no org/other"),
        ({"statuses": [403] * 9}, SOURCE, DownloadFailed, "refused .HTTP 403"),
        ({"statuses": [404] * 9}, SOURCE, ModelNotFound, "any more"),
        ({"statuses": [500] * 9}, SOURCE, DownloadFailed, "HTTP 500"),
    ]
    for token in (None, TOKEN):
        if token is None:
            monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        else:
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        for faults, source, kind, words in cases:
            if token and "is_private" in faults:
                continue
            for name, value in faults.items():
                setattr(hub, name, value)
            with pytest.raises(kind, match=words) as raised:
                store.pull(source)
            assert raised.value.hint
            hub.is_gated = hub.is_private = False
            hub.statuses = []
    assert store.list() == []


def test_a_hub_that_lists_names_alone_is_asked_for_the_rest(hub: FakeHub, repository: Path, store: Store) -> None:
    hub.tells_metadata = False
    assert_right(store.pull(SOURCE).path, repository)
    assert hub.file_bytes == size_of(*repository.iterdir())


def test_revisions_share_what_is_the_same(hub: FakeHub, repository: Path, store: Store) -> None:
    first = store.pull(SOURCE)
    hub.commits |= {"v2": "2" * 40, "2" * 40: "2" * 40}
    (repository / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 32}))
    hub.requests.clear()
    second = store.pull(f"{SOURCE}@v2")
    assert (first.spec.context_tokens, second.spec.context_tokens) == (64, 32)
    assert second.path.name == "2" * 40
    assert hub.file_bytes == size_of(repository / "config.json")
    offline = Store(store.root.with_name("offline"), offline=True)
    assert offline.pull(f"{SOURCE}@v2").path == second.path
    assert offline.pull(SOURCE).path == first.path


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
        numbers = test_awq_gptq.draw(4, 128)
        quantized = test_awq_gptq.awq(*numbers) if form == "AWQ" else test_awq_gptq.gptq(*numbers, 4)
        if form == "GPTQ":
            quantized["bias"] = np.zeros(quantized["qweight"].shape[1], np.float16)
        test_awq_gptq.write(repository, quantized, getattr(test_awq_gptq, form))
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


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_fills_up_is_told_and_can_be_gone_on_with(
    hub: FakeHub, repository: Path, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "cache")]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("no right to mount")
    try:
        roomy = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: roomy)
            with pytest.raises(NoSpace, match="filled up"):
                store.pull(SOURCE)
        came = hub.file_bytes
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "cache")], check=True)
        assert_right(store.pull(SOURCE).path, repository)
        assert hub.file_bytes - came < size_of(repository / WEIGHTS) - 500_000
    finally:
        subprocess.run(["umount", str(tmp_path / "cache")], check=True)


class Peers:
    """Another host that has the files of `folder`; `spoils` changes a byte, `gives` bytes before it is gone."""

    def __init__(self, folder: Path, *, spoils: bool = False, gives: int | None = None) -> None:
        self.files = {checksum_of(path): path.read_bytes() for path in folder.iterdir()}
        self.spoils = spoils
        self.gives = gives
        self.given = 0

    def holds(self, sha256: str) -> bool:
        return sha256 in self.files

    def read(self, sha256: str, offset: int, out: memoryview) -> None:
        if self.gives is not None and self.given + len(out) > self.gives:
            raise DownloadFailed("the peer is gone")
        out[:] = self.files[sha256][offset : offset + len(out)]
        if self.spoils:
            out[0] ^= 1
        self.given += len(out)


def test_peers_are_asked_before_the_hub(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    peers = Peers(repository)
    model = Store(tmp_path / "home", peers=peers).pull(SOURCE)
    assert_right(model.path, repository)
    assert peers.given == size_of(repository / WEIGHTS)
    assert hub.file_bytes <= size_of(repository / "config.json") + (1 << 16)


def test_what_a_peer_began_the_hub_ends(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    peers = Peers(repository, gives=3 * SEGMENT_BYTES)
    assert_right(Store(tmp_path / "home", peers=peers).pull(SOURCE).path, repository)
    assert peers.given >= SEGMENT_BYTES
    assert hub.file_bytes <= size_of(*repository.iterdir()) - peers.given + (1 << 16)


def test_a_peer_that_gives_wrong_bytes_does_no_harm(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    assert_right(Store(tmp_path / "home", peers=Peers(repository, spoils=True)).pull(SOURCE).path, repository)


def test_a_file_that_another_model_has_is_not_fetched(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path
) -> None:
    first = store.pull(SOURCE)
    twin = shutil.copytree(repository, tmp_path / "twin")
    (twin / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 32}))
    hub.repositories["org/twin"] = twin
    hub.requests.clear()
    second = store.pull("hf:org/twin")
    assert_right(second.path, twin)
    assert hub.file_bytes <= size_of(twin / "config.json") + (1 << 16)
    assert (second.path / WEIGHTS).samefile(first.path / WEIGHTS)
    store.remove(first.name)
    assert_right(second.path, twin)


def test_a_copy_that_is_not_what_its_name_says_is_not_used(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path
) -> None:
    blobs = tmp_path / "cache" / "models--some--one" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / checksum_of(repository / WEIGHTS)).write_bytes(bytes(size_of(repository / WEIGHTS)))
    assert_right(store.pull(SOURCE).path, repository)


def test_offline_nothing_is_asked(
    hub: FakeHub, repository: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = Store(tmp_path / "offline", offline=True)
    path = store.pull(SOURCE).path
    asked = len(hub.requests)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"offline, and yet: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(subprocess, "run", refuse)  # pip
    assert offline.pull(SOURCE).path == path
    with pytest.raises(DownloadFailed, match=r"its tiny\.gguf is not in the hub's cache") as raised:
        offline.pull(f"{SOURCE}/tiny.gguf")
    assert "without --offline" in raised.value.hint
    with pytest.raises(DownloadFailed, match="not in the store"):
        offline.pull("pypi:some-model==1.0")
    (path / WEIGHTS).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadFailed, match="only a part of it"):
        Store(tmp_path / "third").pull(SOURCE)
    assert len(hub.requests) == asked
