"""Endpoints as other hosts, and users, write them."""

from __future__ import annotations

import pytest

from transport.links.endpoints import is_host_endpoint, is_port


@pytest.mark.parametrize("text", ["", "0", "-1", "65536", "9" * 5000, "１２３", "1 ", "0x1", "1e3"])
def test_what_is_no_port_is_told(text: str) -> None:
    assert not is_port(text)
    assert not is_host_endpoint(f"tcp://192.168.1.7:{text}")


def test_ports_are_ports() -> None:
    assert is_port("1") and is_port("65535") and is_port("00443")
    assert is_host_endpoint("tcp://192.168.1.7:65535")
    assert not is_host_endpoint("tcp://0.0.0.0:5")
    assert not is_host_endpoint("ipc:///tmp/x:5")
