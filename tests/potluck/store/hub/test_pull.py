"""What goes wrong between a hub and a disk: cut connections, kills, wrong bytes, refusals, full disks."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from potluck.store.sources import PullProgress
from potluck.store.store import Store
from potluck.store.transfer import present_bytes
from tests.support.store.hub_checks import SEGMENT_BYTES, SOURCE, WEIGHTS, assert_right, incomplete, size_of
from tests.support.store.hub_server import TOKEN, FakeHub, checksum_of
from transport.errors import DownloadFailed, ModelNotFound, NoSpace, PotluckError, WrongBytes

PULL = (
    "import sys; from pathlib import Path; from potluck.store.store import Store; "
    "import potluck.store.hub_fetcher as fetch; "
    + (
        f"fetch.SEGMENT_BYTES = {SEGMENT_BYTES}; "
        "print(Store(Path(sys.argv[1])).pull(sys.argv[2], lambda p: print(p.stage, p.done, flush=True)).path)"
    )
)


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
    hub.go.clear()
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", PULL, str(store.root), SOURCE]
    size = size_of(repository / WEIGHTS)
    partial = (
        tmp_path / "cache" / "models--org--name" / "blobs" / f"{checksum_of(repository / WEIGHTS)}.potluck.incomplete"
    )
    for at_least in (100_000, 700_000):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while present_bytes(partial, size, SEGMENT_BYTES) < at_least:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    hub.go.set()
    kept = present_bytes(partial, size, SEGMENT_BYTES)
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
    with pytest.raises(WrongBytes, match=r"org/name: model\.safetensors has the wrong checksum") as raised:
        store.pull(SOURCE)
    assert checksum_of(repository / WEIGHTS) in raised.value.message
    assert not incomplete(tmp_path)
    assert store.list() == []
    shutil.rmtree(tmp_path / "cache")
    hub.wrong = {"config.json"}
    with pytest.raises(WrongBytes, match=r"config\.json has the wrong checksum"):
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
