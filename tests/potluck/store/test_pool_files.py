"""A pull on the head's host takes from the pool what the pool has. The other hosts are this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from potluck.head.models import pool_files
from potluck.head.models.pool_files import PoolFiles
from potluck.head.models.search import FileHolder, find_file_holders, list_remote_models
from potluck.host.piece_server import HostModelService
from potluck.store.hub_repository import Hub
from potluck.store.store import Store
from tests.support.doctor.small_head import SmallHead
from tests.support.head.pool_members import FakeHost
from tests.support.store.hub_checks import SOURCE, WEIGHTS, assert_right, size_of
from tests.support.store.hub_server import FakeHub, checksum_of
from transport.errors import DownloadFailed

HEAD, BETA, GAMMA = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SmallHead, ExitStack]]:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "head"))
    with ExitStack() as stack:
        made = SmallHead(tmp_path / "head", HEAD)
        stack.callback(made.close)
        yield made, stack


@pytest.fixture
def pulled(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Of another host, which has pulled the model into a cache of its own."""
    with monkeypatch.context() as patched:
        cache = tmp_path / "guest-cache"
        patched.setattr(Hub, "from_environment", lambda: Hub(endpoint=hub.url, cache=cache))
        store = Store(tmp_path / "guest")
        store.pull(SOURCE)
    hub.requests.clear()
    return store


def guest(head: tuple[SmallHead, ExitStack], name: str, address: str, store: Store) -> FakeHost:
    """One that answers as `potluck join` does."""
    made = FakeHost(*head, name, address, lambda question: [])
    answers = HostModelService(store, made.piece_server, say=lambda line: None)

    def answer(question: Any) -> list[Any]:
        answers.on_request(question, made.control.send)
        return []

    made.answer = answer
    return made


def files_of(head: SmallHead) -> PoolFiles:
    assert head.here.keys is not None
    return PoolFiles(lambda sha256: find_file_holders(head.pool.hosts, sha256).holders, head.here.keys)


def test_what_the_pool_has_is_not_downloaded(
    head: tuple[SmallHead, ExitStack], hub: FakeHub, pulled: Store, repository: Path, tmp_path: Path
) -> None:
    guest(head, "beta", BETA, pulled)
    guest(head, "gamma", GAMMA, pulled)
    with closing(files_of(head[0])) as files:
        model = Store(tmp_path / "own", peers=files).pull(SOURCE)
        given = dict(files.bytes_by_host)
    assert_right(model.path, repository)
    # Segments come at the same time, from both.
    assert set(given) == {"beta", "gamma"}
    assert sum(given.values()) == size_of(repository / WEIGHTS)
    assert hub.file_bytes <= size_of(repository / "config.json") + (1 << 16)
    (told,) = [one for one in list_remote_models(head[0].pool.hosts).models if one.host == "beta"]
    assert (told.name, told.source) == ("org/name", SOURCE)


def test_a_host_that_is_gone_or_lies_costs_nothing_but_time(
    head: tuple[SmallHead, ExitStack],
    hub: FakeHub,
    pulled: Store,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_files, "BLOCK_S", 1.0)
    gone = guest(head, "beta", BETA, pulled)
    wrong = checksum_of(repository / WEIGHTS)
    liar = guest(head, "gamma", GAMMA, pulled)
    (tmp_path / "lie").write_bytes(bytes(size_of(repository / WEIGHTS)))
    holders = find_file_holders(head[0].pool.hosts, wrong).holders
    assert [holder.name for holder in holders] == ["beta", "gamma"]
    gone.piece_server.close = lambda: None  # type: ignore[method-assign]
    gone.piece_server._server.close()
    liar.piece_server.share_file(wrong, tmp_path / "lie")
    assert head[0].here.keys is not None
    with closing(PoolFiles(lambda sha256: list(holders) if sha256 == wrong else [], head[0].here.keys)) as files:
        model = Store(tmp_path / "own", peers=files).pull(SOURCE)
    assert_right(model.path, repository)
    assert hub.file_bytes >= size_of(repository / WEIGHTS)


def test_only_what_a_store_downloaded_is_given_and_only_by_its_checksum(
    head: tuple[SmallHead, ExitStack], pulled: Store, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "guest" / "secret").write_text("private")
    beta = guest(head, "beta", BETA, pulled)
    hosts = head[0].pool.hosts
    for asked in (checksum_of(tmp_path / "guest" / "secret"), "../../secret", "", "ab" * 32, "AB" * 32):
        assert find_file_holders(hosts, asked).holders == []
    wanted = checksum_of(repository / WEIGHTS)
    assert head[0].here.keys is not None
    # It gives nothing by its checksum before the head has asked for it.
    untold = FileHolder(name="beta", endpoint=beta.piece_server.endpoint, key=beta.keys.public, num_bytes=8)
    with closing(PoolFiles(lambda sha256: [untold], head[0].here.keys)) as files:
        assert files.holds(wanted)
        with pytest.raises(DownloadFailed, match="does not have it"):
            files.read(wanted, 0, memoryview(bytearray(8)))


def test_several_threads_read_at_once(head: tuple[SmallHead, ExitStack], pulled: Store, repository: Path) -> None:
    guest(head, "beta", BETA, pulled)
    wanted, content = checksum_of(repository / WEIGHTS), (repository / WEIGHTS).read_bytes()
    found: dict[int, bytes] = {}
    with closing(files_of(head[0])) as files:
        assert files.holds(wanted)

        def read(number: int) -> None:
            block = memoryview(bytearray(300_000))
            files.read(wanted, 100_000 * number, block)
            found[number] = bytes(block)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(DownloadFailed):
            files.read(wanted, len(content) - 5, memoryview(bytearray(10)))
    assert found == {number: content[100_000 * number :][:300_000] for number in range(6)}
