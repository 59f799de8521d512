"""A host finds the head of its pool again, whoever else answers; and learns that it was put out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from devices.identity import load_keys
from devices.known_pools import KnownPool, load_known_pools, save_known_pool
from potluck.config import Settings
from potluck.head_search import find_again
from potluck.paths import identity_dir, known_pools_file
from tests.devices.test_front_door import HEAD, House
from transport.errors import NotAllowed, NotRunning, VersionMismatch

SETTINGS = Settings(discovery=False)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    made = House(tmp_path / "roster.json")
    made.roster.add(load_keys(identity_dir()).public, "mac", "macOS")
    yield made
    made.door.close()


@pytest.fixture
def pool(house: House) -> KnownPool:
    """As this host knows it."""
    door = f"127.0.0.1:{house.door.port}"
    known = KnownPool(pool=house.facts.pool, key=HEAD.public, name="den", my_name="mac", doors=(door,))
    save_known_pool(known_pools_file(), known)
    return known


class Impostor:
    """Says of itself what the head says."""

    def __init__(self, house: House, path: Path) -> None:
        self._house = House(path)
        self._house.facts = house.facts
        self._house.door._keys = load_keys(path.parent / "other")  # Whose secret it has.
        self.door = f"127.0.0.1:{self._house.door.port}"
        self.close = self._house.door.close


def test_who_claims_to_be_the_head_does_not_hide_it(house: House, pool: KnownPool, tmp_path: Path) -> None:
    """A host that once met a liar, while the head was away, would else ask it first for ever."""
    impostor = Impostor(house, tmp_path / "impostor.json")
    try:
        found = find_again(replace(pool, doors=(impostor.door, *pool.doors)), SETTINGS)
    finally:
        impostor.close()
    assert found.head.control == f"tcp://127.0.0.1:{house.facts.control_port}"
    assert found.pool.doors[0] == pool.doors[0]


def test_a_liar_alone_is_waited_out(house: House, pool: KnownPool, tmp_path: Path) -> None:
    impostor = Impostor(house, tmp_path / "impostor.json")
    try:
        with pytest.raises(NotRunning, match="not to be found") as raised:
            find_again(replace(pool, doors=(impostor.door,)), SETTINGS)
    finally:
        impostor.close()
    assert "does not prove that it is den" in raised.value.hint


def test_a_host_that_was_revoked_is_told_so(house: House, pool: KnownPool) -> None:
    house.roster.revoke("mac")
    with pytest.raises(NotAllowed, match="den has revoked this host") as raised:
        find_again(pool, SETTINGS)
    assert "potluck join CODE" in raised.value.hint


def test_a_head_that_has_lost_its_roster_says_that_it_does_not_know_this_host(house: House, pool: KnownPool) -> None:
    house.roster.path.unlink()
    time.sleep(0.15)  # It looks at its roster so often.
    with pytest.raises(NotAllowed, match="does not know this host any more"):
        find_again(pool, SETTINGS)


def test_another_version_of_the_head_is_an_end(house: House, pool: KnownPool) -> None:
    house.facts = replace(house.facts, protocol=house.facts.protocol + 1)
    with pytest.raises(VersionMismatch, match="den"):
        find_again(pool, SETTINGS)


def test_what_the_head_is_called_now_is_remembered(house: House, pool: KnownPool) -> None:
    house.facts = replace(house.facts, name="study")
    assert find_again(pool, SETTINGS).pool.name == "study"
    assert [known.name for known in load_known_pools(known_pools_file())] == ["study"]
