"""A host finds the head of its pool again, whoever else answers; and learns that it was evicted."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from devices.discovery.mdns import AdvertisedPool
from devices.pairing.identity import load_keys
from devices.pairing.known_pools import KnownPool, load_known_pools, save_known_pool
from potluck.host import find_head
from potluck.host.find_head import locate_head, pool_to_join
from potluck.system.paths import identity_dir, known_pools_file
from potluck.system.settings import Settings
from tests.support.devices.pairing_head import HEAD, House
from transport.errors import ConfigError, NotAllowed, NotRunning, VersionMismatch

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
        found = locate_head(replace(pool, doors=(impostor.door, *pool.doors)), SETTINGS)
    finally:
        impostor.close()
    assert found.head.control == f"tcp://127.0.0.1:{house.facts.control_port}"
    assert found.pool.doors[0] == pool.doors[0]


def test_a_liar_alone_is_waited_out(house: House, pool: KnownPool, tmp_path: Path) -> None:
    impostor = Impostor(house, tmp_path / "impostor.json")
    try:
        with pytest.raises(NotRunning, match="is not found") as raised:
            locate_head(replace(pool, doors=(impostor.door,)), SETTINGS)
    finally:
        impostor.close()
    assert "does not prove that it is den" in raised.value.hint


def test_a_host_that_was_revoked_is_told_so(house: House, pool: KnownPool) -> None:
    house.roster.revoke("mac")
    with pytest.raises(NotAllowed, match="den has revoked this host") as raised:
        locate_head(pool, SETTINGS)
    assert "potluck join CODE" in raised.value.hint


def test_a_head_that_has_lost_its_roster_says_that_it_does_not_know_this_host(house: House, pool: KnownPool) -> None:
    house.roster.path.unlink()
    time.sleep(0.15)  # It looks at its roster so often.
    with pytest.raises(NotAllowed, match="does not know this host any more"):
        locate_head(pool, SETTINGS)


def test_another_version_of_the_head_is_an_end(house: House, pool: KnownPool) -> None:
    house.facts = replace(house.facts, protocol=house.facts.protocol + 1)
    with pytest.raises(VersionMismatch, match="den"):
        locate_head(pool, SETTINGS)


def test_what_the_head_is_called_now_is_remembered(house: House, pool: KnownPool) -> None:
    house.facts = replace(house.facts, name="study")
    assert locate_head(pool, SETTINGS).pool.name == "study"
    assert [known.name for known in load_known_pools(known_pools_file())] == ["study"]


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def test_many_pools_that_somebody_made_up_do_not_keep_a_user_waiting(
    house: House, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = [AdvertisedPool(addresses=("127.0.0.1",), port=silent, fingerprint=f"{n:04x}-0-0-0") for n in range(64)]
    real = AdvertisedPool(addresses=("127.0.0.1",), port=house.door.port, fingerprint="0")
    monkeypatch.setattr(find_head, "_browse", lambda fingerprint: [real, *made_up])
    started = time.monotonic()
    with pytest.raises(ConfigError, match="65 pools were found") as raised:
        pool_to_join(None, "7K3M-9XQ2", Settings(), say=lambda line: None)
    assert time.monotonic() - started < 20.0
    assert "(den)" in raised.value.hint and "(does not answer)" in raised.value.hint


def test_a_head_in_two_networks_is_joined_in_the_one_that_this_host_is_in(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody is at the first one: a loopback address where nothing listens.
    found = AdvertisedPool(addresses=("127.0.0.9", "127.0.0.1"), port=house.door.port, fingerprint="0")
    monkeypatch.setattr(find_head, "_browse", lambda fingerprint: [found])
    code = str(house.door.new_code())
    pool = pool_to_join(None, code, Settings(), say=lambda line: None)
    assert pool.doors == (f"127.0.0.1:{house.door.port}",)


def test_places_that_somebody_made_up_do_not_keep_the_head_from_being_found(
    house: House, pool: KnownPool, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes as long as one that does not answer."""
    made_up = [AdvertisedPool(addresses=("127.0.0.1",), port=silent, fingerprint=pool.fingerprint) for _ in range(15)]
    real = AdvertisedPool(addresses=("127.0.0.9", "127.0.0.1"), port=house.door.port, fingerprint=pool.fingerprint)
    monkeypatch.setattr(find_head, "_browse", lambda fingerprint: [*made_up, real])
    started = time.monotonic()
    found = locate_head(replace(pool, doors=("127.0.0.9:1",)), Settings())
    assert time.monotonic() - started < 30.0
    assert found.pool.doors[0] == pool.doors[0]


def test_a_name_that_nobody_knows_now_does_not_keep_the_head_from_being_found(house: House, pool: KnownPool) -> None:
    found = locate_head(replace(pool, doors=("no-such-host.invalid:11501", *pool.doors)), SETTINGS)
    assert found.address == "127.0.0.1"
