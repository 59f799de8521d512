"""What is said of this host by itself, and of a network's multicast."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from devices.hardware.interfaces import LanInterface
from potluck.cli.doctor.check import Check, worst_state
from potluck.cli.doctor.this_host import (
    PORTS,
    ExcludedInterface,
    LocalHostFacts,
    exclusion_reason,
    gather_host,
    host_checks,
    lan_network,
    linux_firewalls,
    listening_ports,
    macos_firewalls,
    multicast_check,
    opening_hint,
    windows_firewalls,
)

CABLE = LanInterface(name="eth0", address="192.168.1.20", prefix=24, is_wifi=False)
WIFI = LanInterface(name="wlan0", address="192.168.1.21", prefix=24, is_wifi=True)
GOOD = LocalHostFacts(
    potluck="0.1.0",
    protocol=5,
    python="3.11.7",
    platform="Linux x86-64",
    free_bytes=8 * 2**30,
    total_bytes=16 * 2**30,
    home=Path("/home/me/potluck"),
    is_home_writable=True,
    disk_free_bytes=100 * 2**30,
    interfaces=(CABLE,),
    excluded=(),
    clock_s=1.8e9,
    head_ports=(),
    busy_ports=(),
)


def check_of(facts: LocalHostFacts, name: str, *, is_lan_wanted: bool = True) -> Check:
    return next(check for check in host_checks(facts, is_lan_wanted=is_lan_wanted) if check.name == name)


def test_a_host_that_is_well_has_no_hints() -> None:
    checks = host_checks(GOOD)
    assert worst_state(checks) == "ok"
    assert [check.hint for check in checks] == [""] * len(checks)


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        ({"platform": "Linux x86-64 (WSL)"}, "versions", "warning", "Windows"),
        ({"free_bytes": 2**28}, "memory", "warning", "256 MiB free"),
        ({"disk_free_bytes": 2**30}, "disk", "warning", "potluck cache"),
        ({"disk_free_bytes": 2**20}, "disk", "problem", "POTLUCK_HOME"),
        ({"is_home_writable": False}, "disk", "problem", "/home/me/potluck can't be written"),
        ({"interfaces": ()}, "network", "problem", "cable"),
        ({"interfaces": (WIFI,)}, "network", "warning", "a cable is faster"),
        ({"interfaces": (CABLE, WIFI)}, "network", "ok", "wlan0 192.168.1.21/24 (Wi-Fi)"),
        (
            {"excluded": (ExcludedInterface(name="wg0", address="10.0.0.2", kind="a VPN"),)},
            "not used",
            "ok",
            "wg0 10.0.0.2 (a VPN)",
        ),
        ({"clock_s": 0.0}, "clock", "problem", "1970-01-01"),
        ({"busy_ports": (11502,)}, "ports", "warning", "11501, 11503 free; 11502 taken"),
        ({"head_ports": PORTS}, "ports", "ok", "11501, 11502, 11503 used by the head"),
    ],
)
def test_what_is_not_as_it_should_be_is_said_with_what_to_do(
    changes: dict[str, object], name: str, state: str, words: str
) -> None:
    check = check_of(replace(GOOD, **changes), name)  # type: ignore[arg-type]
    assert check.state == state
    assert words in check.what + check.hint
    assert bool(check.hint) == (state != "ok")


def test_who_keeps_others_out_needs_no_network() -> None:
    assert check_of(replace(GOOD, interfaces=()), "network", is_lan_wanted=False).state == "warning"


@pytest.mark.parametrize(
    ("name", "address", "why"),
    [
        ("lo", "127.0.0.1", None),
        ("eth0", "192.168.1.20", None),
        ("docker0", "172.17.0.1", "inside this host"),
        ("utun3", "100.64.0.1", "a VPN"),
        ("tailscale0", "100.64.0.1", "a VPN"),
        ("en0", "169.254.7.7", "no router gave it an address"),
    ],
)
def test_interfaces_are_left_out_for_a_reason(name: str, address: str, why: str | None) -> None:
    assert exclusion_reason(name, address) == why


def test_ports_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "not" / "made"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port in listening_ports(os.getpid())
        monkeypatch.setattr("potluck.cli.doctor.this_host.PORTS", (port,))
        assert gather_host(()).busy_ports == (port,)
        assert gather_host({port}).busy_ports == ()
        assert gather_host({port}).head_ports == (port,)
    assert not (tmp_path / "not").exists()


def test_multicast_that_does_not_work_says_what_works_instead() -> None:
    assert multicast_check([(CABLE, ""), (WIFI, "")]).state == "ok"
    broken = multicast_check([(CABLE, ""), (WIFI, "Network is unreachable")])
    assert (broken.state, broken.what) == ("warning", "wlan0: Network is unreachable")
    assert "--head" in broken.hint


def test_firewalls_are_told_by_what_the_system_says() -> None:
    states = {"ufw": "active", "firewalld": "inactive", "nftables": "active"}
    assert linux_firewalls(states, "# ENABLED=yes\nENABLED=no\n") == ("nftables",)
    assert linux_firewalls(states, "ENABLED=yes\n") == ("ufw", "nftables")
    assert linux_firewalls({}, "ENABLED=yes\n") == ()
    assert macos_firewalls("Firewall is enabled. (State = 1)") == ("macOS firewall",)
    assert macos_firewalls("Firewall is disabled. (State = 0)") == ()
    assert windows_firewalls("State                                 ON\nOk.") == ("Windows firewall",)
    assert windows_firewalls("State                                 OFF\nOk.") == ()


@pytest.mark.parametrize("name", ["ufw", "firewalld", "nftables", "macOS firewall", "Windows firewall"])
def test_each_firewall_can_be_opened(name: str) -> None:
    words = opening_hint((name,), lan_network([CABLE]))
    assert name in words
    assert "192.168.1.0/24" in words or "Python" in words


def test_without_a_known_firewall_there_is_still_a_hint() -> None:
    assert "192.168.1.0/24" in opening_hint((), lan_network([CABLE]))
    assert opening_hint((), lan_network([])) == "let TCP from your network through this host's firewall"
