"""Where a head is, as a user writes it; and hosts that have no network."""

from __future__ import annotations

import pytest

from potluck.host import local_host
from potluck.host.local_host import PAIRING_PORT, parse_pairing_address, this_host
from potluck.system.settings import Settings
from transport.errors import ConfigError


def test_a_door_is_an_address_with_a_port_or_the_usual_one() -> None:
    assert parse_pairing_address("192.168.1.20") == ("192.168.1.20", PAIRING_PORT)
    assert parse_pairing_address("192.168.1.20:5000") == ("192.168.1.20", 5000)
    assert parse_pairing_address("localhost:5000") == ("127.0.0.1", 5000)


@pytest.mark.parametrize("text", ["::1", "[::1]:11501", "fe80::1%eth0", "[fe80::1]", "2001:db8::7:11501"])
def test_an_address_of_ipv6_is_told_from_a_typing_mistake(text: str) -> None:
    with pytest.raises(ConfigError, match="IPv6") as raised:
        parse_pairing_address(text)
    assert "IPv4" in raised.value.hint


@pytest.mark.parametrize("text", ["", ":5", "host:", "host:0", "host:x", "host:" + "9" * 5000])
def test_what_is_no_door_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"head.s address|no host"):
        parse_pairing_address(text)


def test_a_host_without_ipv4_is_alone_or_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_host, "lan_address", lambda towards: None)
    assert this_host(Settings()).address is None
    with pytest.raises(ConfigError, match="no IPv4 address") as raised:
        this_host(Settings(), target="192.168.1.20")
    assert "IPv6" in raised.value.hint
