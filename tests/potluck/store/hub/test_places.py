"""Where files of a hub come to lie, also where other programs work there at the same time, or the disk is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck.store.hub_repository import CachedRepository, Hub, HubFile
from potluck.store.hub_snapshot import FIRST_BYTES
from potluck.store.sources import HubSource, parse_source
from potluck.store.store import Store
from tests.support.store.hub_checks import SOURCE, WEIGHTS, assert_right
from tests.support.store.hub_server import COMMIT, REPOSITORY, FakeHub
from transport.errors import BadRequest, NoSpace, PotluckError


@pytest.mark.parametrize(
    "rest", ["@/tmp/outside", "@main/", "@a//b", "@./a", "//tmp/x.gguf", "/./x.gguf", "/a//b.gguf"]
)
def test_neither_a_revision_nor_a_file_can_be_a_path_elsewhere(rest: str) -> None:
    with pytest.raises(BadRequest):
        parse_source(f"hf:{REPOSITORY}{rest}")


def test_revisions_with_folders_in_their_names_are_known_by_them() -> None:
    source = parse_source(f"hf:{REPOSITORY}@refs/pr/1")
    assert isinstance(source, HubSource) and source.revision == "refs/pr/1"
    source = parse_source(f"hf:{REPOSITORY}/Q4_K_M/model.gguf@v1.0")
    assert isinstance(source, HubSource) and (source.file, source.revision) == ("Q4_K_M/model.gguf", "v1.0")


def test_who_links_a_file_at_the_same_time_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other commits link to the same blob."""
    data = b"weights"
    file = HubFile(name=WEIGHTS, num_bytes=len(data), checksum="ab" * 32)
    place = CachedRepository(cache=tmp_path, repository=REPOSITORY, commit=COMMIT)
    blob = place.folder / "blobs" / file.checksum
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    symlink = os.symlink

    def beaten(source: str, target: str, *arguments: object) -> None:
        (place.snapshot / WEIGHTS).unlink(missing_ok=True)
        symlink(source, place.snapshot / WEIGHTS)
        symlink(source, target)

    monkeypatch.setattr(os, "symlink", beaten)
    found = place.find(file)
    assert found is not None and found.read_bytes() == data
    assert blob.is_file() and not blob.is_symlink()
    assert [path.name for path in place.snapshot.iterdir()] == [WEIGHTS]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own without room for anything."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_data_folder_that_is_full_is_told(hub: FakeHub, full_disk: Path) -> None:
    """It, not the hub's cache, takes the files' beginnings."""
    store = Store(full_disk / "home")
    with pytest.raises(NoSpace, match="full"):
        store.pull(SOURCE)
    assert sum(one.served for one in hub.asked(WEIGHTS)) <= FIRST_BYTES


def test_a_cache_that_can_not_be_written_is_told(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    store.pull(SOURCE)
    hub.commits["next"] = "ab" * 20
    place = CachedRepository(cache=tmp_path / "cache", repository=REPOSITORY, commit="ab" * 20)
    place.snapshot.write_bytes(b"")  # Where a folder belongs.
    with pytest.raises(PotluckError, match="can't write"):
        store.pull(f"{SOURCE}@next")


def test_a_cache_below_a_folder_called_snapshots_is_freed_too(
    hub: FakeHub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "snapshots" / "hub"
    monkeypatch.setattr(Hub, "from_environment", lambda: Hub(endpoint=hub.url, cache=cache))
    store = Store(tmp_path / "home")
    assert_right(store.pull(SOURCE).path, repository)
    store.remove(REPOSITORY)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1000]
