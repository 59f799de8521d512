"""Heads are found in a lab whose hosts are namespaces: nothing is sent to the network of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zeroconf import ServiceInfo

from bench.lab import Lab, parse_spec, why_not
from devices.discovery import mdns
from devices.discovery.mdns import SERVICE, AdvertisedPool, Advertiser, browse_pools, parse_service, service_info
from devices.pairing.identity import fingerprint
from transport.errors import ConfigError

POOL, OTHER_POOL = "ab" * 16, "cd" * 16
in_a_lab = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    hosts = [{"name": "den"}, {"name": "mac"}, {"name": "attic"}]
    with Lab(parse_spec({"hosts": hosts}), store=tmp_path) as lab:
        yield lab


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.devices.discovery_end", *arguments]


ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path)}


def advertise(lab: Lab, host: str, pool: str, port: int) -> IO[str]:
    """It goes on until what is returned is closed."""
    child = lab.popen(
        host, command("advertise", pool, str(port)), environment=ENVIRONMENT, stdin=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    return child.stdin


def ask(lab: Lab, host: str, *arguments: str) -> Any:
    child = lab.popen(host, command(*arguments), environment=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    said, _ = child.communicate(timeout=240)
    assert child.returncode == 0
    return json.loads(said)


def ip(lab: Lab, host: str, *arguments: str) -> None:
    assert lab.run(host, ["ip", *arguments]).returncode == 0


def door(lab: Lab, host: str, pool: str, port: int) -> dict[str, Any]:
    return {"addresses": [lab.address(host)], "port": port, "fingerprint": fingerprint(pool)}


def until_found(lab: Lab, host: str, expected: list[dict[str, Any]]) -> None:
    deadline = time.monotonic() + 240.0
    while (found := ask(lab, host, "find", "1")) != expected and time.monotonic() < deadline:
        pass
    assert found == expected


@in_a_lab
def test_pools_are_found_by_their_fingerprints_and_only_at_addresses_of_the_lan(lab: Lab) -> None:
    ip(lab, "den", "link", "add", "docker0", "type", "veth", "peer", "name", "veth1")
    ip(lab, "den", "address", "add", "172.17.0.1/16", "dev", "docker0")
    for container in ("docker0", "veth1"):
        ip(lab, "den", "link", "set", container, "up")
    assert ask(lab, "den", "addresses") == {
        "names": ["eth0"],
        "addresses": [lab.address("den")],
        "chosen": lab.address("den"),  # without a default route
    }
    den, attic = advertise(lab, "den", POOL, 11501), advertise(lab, "attic", OTHER_POOL, 4242)
    both = [door(lab, "attic", OTHER_POOL, 4242), door(lab, "den", POOL, 11501)]
    until_found(lab, "mac", sorted(both, key=lambda pool: str(pool["fingerprint"])))
    # It does not wait for more.
    assert ask(lab, "mac", "find", "600", fingerprint(POOL)) == [door(lab, "den", POOL, 11501)]
    den.close()
    until_found(lab, "mac", [door(lab, "attic", OTHER_POOL, 4242)])
    attic.close()


@in_a_lab
def test_a_head_whose_address_changes_is_found_at_the_new_one(lab: Lab) -> None:
    den = advertise(lab, "den", POOL, 11501)
    until_found(lab, "mac", [door(lab, "den", POOL, 11501)])
    ip(lab, "den", "address", "del", f"{lab.address('den')}/24", "dev", "eth0")
    ip(lab, "den", "address", "add", "10.77.0.99/24", "dev", "eth0")
    until_found(lab, "mac", [door(lab, "den", POOL, 11501) | {"addresses": ["10.77.0.99"]}])
    den.close()


def test_the_record_says_the_pools_fingerprint_and_nothing_of_the_host() -> None:
    info = service_info(fingerprint(POOL), 11501, ("192.168.1.20",))
    assert info.name == f"{fingerprint(POOL)}.{SERVICE}"
    assert info.server == f"potluck-{fingerprint(POOL)}.local."
    assert info.properties == {b"v": b"1", b"pool": fingerprint(POOL).encode()}
    assert parse_service(info) == AdvertisedPool(addresses=("192.168.1.20",), port=11501, fingerprint=fingerprint(POOL))


@pytest.mark.parametrize(
    ("port", "properties", "addresses"),
    [
        (11501, {"pool": "not a fingerprint"}, ["192.168.1.20"]),
        (11501, {"pool": b"\xff\xfe"}, ["192.168.1.20"]),
        (11501, {}, ["192.168.1.20"]),
        (0, {"pool": fingerprint(POOL)}, ["192.168.1.20"]),
        (11501, {"pool": fingerprint(POOL)}, []),
        (11501, {"pool": fingerprint(POOL)}, ["127.0.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255"]),
    ],
)
def test_what_is_no_record_of_ours_is_passed_over(port: int, properties: dict[str, Any], addresses: list[str]) -> None:
    info = ServiceInfo(SERVICE, f"x.{SERVICE}", port=port, properties=properties, parsed_addresses=addresses)
    assert parse_service(info) is None


@given(st.binary(max_size=255), st.integers(0, 2**16 - 1), st.lists(st.ip_addresses(v=4).map(str), max_size=20))
@settings(max_examples=100, deadline=None)
def test_whatever_a_record_holds_it_is_a_pool_or_nothing(text: bytes, port: int, addresses: list[str]) -> None:
    found = parse_service(ServiceInfo(SERVICE, f"x.{SERVICE}", port=port, properties=text, parsed_addresses=addresses))
    assert found is None or (0 < found.port < 65536 and 0 < len(found.addresses) <= 8)


def test_without_a_network_nobody_is_told_and_nobody_is_asked() -> None:
    advertiser = Advertiser(11501, POOL, addresses=lambda: ())
    deadline = time.monotonic() + 60.0
    while advertiser.problem is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert advertiser.problem == "this host has no network with IPv4"
    advertiser.close()
    with pytest.raises(ConfigError, match="no IPv4 network") as raised:
        browse_pools(1.0, addresses=lambda: ())
    assert "--head" in raised.value.hint


class FromNobody(ServiceInfo):
    """What is known of a name that somebody made up: nothing, also when it is asked for."""

    def load_from_cache(self, zc: Any, now: float | None = None) -> bool:
        if not self.name.startswith(fingerprint(POOL)):
            return False
        real = service_info(fingerprint(POOL), 11501, ("192.168.1.20",))
        self.port, self.addresses = real.port, real.addresses
        self._set_properties({b"pool": real.properties[b"pool"]})
        return True

    def request(self, zc: Any, timeout: float, *_: Any, **__: Any) -> bool:
        time.sleep(timeout / 1000)
        return False


def test_names_that_somebody_made_up_use_up_no_more_than_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "ServiceInfo", FromNobody)
    names = mdns._ServiceNames()
    for number in range(40):
        names.add_service(None, SERVICE, f"made-up-{number}.{SERVICE}")  # type: ignore[arg-type]
    names.add_service(None, SERVICE, f"{fingerprint(POOL)}.{SERVICE}")  # type: ignore[arg-type]
    started = time.monotonic()
    found = mdns._collect(None, names, started + 2.0, None)  # type: ignore[arg-type]
    assert time.monotonic() - started < 6.0
    assert [pool.fingerprint for pool in found] == [fingerprint(POOL)]


def test_names_that_somebody_made_up_do_not_take_the_place_of_the_one_that_is_looked_for() -> None:
    names = mdns._ServiceNames(fingerprint(POOL))
    for number in range(1000):
        names.add_service(None, SERVICE, f"made-up-{number}.{SERVICE}")  # type: ignore[arg-type]
    names.add_service(None, SERVICE, f"{fingerprint(POOL)}-2.{SERVICE}")  # type: ignore[arg-type]
    assert list(names.seen()) == [f"{fingerprint(POOL)}-2.{SERVICE}"]
