from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from devices.pairing.identity import fingerprint
from devices.pairing.known_pools import KnownPool, forget_known_pool, load_known_pools, save_known_pool
from transport.errors import ConfigError
from transport.security.curve import new_key_pair

HOME = KnownPool(pool="a" * 32, key=new_key_pair().public, name="den", my_name="mac", doors=("192.168.1.20:11501",))
WORK = KnownPool(pool="b" * 32, key=new_key_pair().public, name="desk", my_name="mac", doors=("10.0.0.2:11501",))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "pools.json"


def test_pools_are_remembered_the_last_joined_first(path: Path) -> None:
    assert load_known_pools(path) == ()
    save_known_pool(path, HOME)
    save_known_pool(path, WORK)
    assert load_known_pools(path) == (WORK, HOME)
    save_known_pool(path, HOME.at("192.168.1.77:11501"))
    home, work = load_known_pools(path)
    assert home.doors == ("192.168.1.77:11501", "192.168.1.20:11501")
    assert work == WORK
    assert path.stat().st_mode & 0o077 == 0


def test_another_head_that_claims_a_known_pool_does_not_take_its_place(path: Path) -> None:
    save_known_pool(path, HOME)
    save_known_pool(path, replace(HOME, key=new_key_pair().public))
    assert HOME in load_known_pools(path)


@pytest.mark.parametrize("text", ["den", HOME.pool, HOME.fingerprint, fingerprint(HOME.key)])
def test_one_of_several_is_forgotten_by_any_of_its_names(path: Path, text: str) -> None:
    save_known_pool(path, HOME)
    save_known_pool(path, WORK)
    assert forget_known_pool(path, text) == HOME
    assert load_known_pools(path) == (WORK,)
    assert forget_known_pool(path) == WORK


def test_forgetting_needs_to_know_which(path: Path) -> None:
    with pytest.raises(ConfigError, match="not joined"):
        forget_known_pool(path)
    save_known_pool(path, HOME)
    save_known_pool(path, WORK)
    for text in (None, "attic"):
        with pytest.raises(ConfigError) as raised:
            forget_known_pool(path, text)
        assert "den" in raised.value.hint
    assert len(load_known_pools(path)) == 2


def test_doors_that_are_no_more_do_not_pile_up() -> None:
    pool = HOME
    for number in range(30):
        pool = pool.at(f"192.168.1.{number}:11501")
    assert len(pool.doors) == 8
    assert pool.doors[0] == "192.168.1.29:11501"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1}', b'{"version": 2, "all": 1}', b"\xff"])
def test_a_broken_or_newer_file_is_named_and_left_as_it_is(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for change in (lambda: load_known_pools(path), lambda: save_known_pool(path, HOME)):
        with pytest.raises(ConfigError, match=r"pools\.json"):
            change()
    assert path.read_bytes() == content
