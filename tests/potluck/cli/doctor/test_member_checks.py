"""A member of a pool: whether its head is there, lets it in, and reaches it, over real sockets."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from devices.pairing.identity import load_keys
from devices.pairing.known_pools import KnownPool, save_known_pool
from devices.pairing.roster import RosterFile
from potluck.cli.doctor.check import Check
from potluck.cli.doctor.command import run_checks
from potluck.cli.doctor.member_checks import (
    HeadAttempt,
    MembershipProbe,
    control_check,
    head_found_check,
    membership_checks,
)
from potluck.cli.doctor.probe import ConnectOutcome, ConnectResult
from potluck.host.find_head import locate_head
from potluck.system.settings import Settings
from tests.support.doctor.small_head import SmallHead
from transport.errors import ConfigError, DeadlineExceeded, NotRunning
from transport.messages.pool import NodeAccepted
from transport.security.curve import new_key_pair

SETTINGS = Settings(lan_host="127.0.0.1", discovery=False)
POOL = KnownPool(pool="ab" * 16, key="k" * 40, name="alpha", my_name="beta", doors=("192.168.1.20:11501",))


def checks_now(settings: Settings = SETTINGS) -> dict[str, Check]:
    return {check.name: check for check in run_checks(settings)}


def test_a_host_and_its_head_that_reach_each_other_are_well(home: Path, head: SmallHead) -> None:
    head.pair(home)
    before = (home / "pools.json").read_bytes()
    found = checks_now()
    about_pool = {name: check for name, check in found.items() if "alpha" in name}
    assert set(about_pool) == {
        "head alpha",
        "alpha: version",
        "alpha: control",
        "alpha: membership",
        "alpha: way back",
        "alpha: clock",
        "alpha: link",
    }
    assert {name: check.state for name, check in about_pool.items() if name != "alpha: link"} == {
        name: "ok" for name in about_pool if name != "alpha: link"
    }
    assert "MB/s" in about_pool["alpha: link"].what
    assert "as beta" in about_pool["alpha: membership"].what
    # Whoever looks changes nothing, and offers nothing.
    assert (home / "pools.json").read_bytes() == before
    assert [host.hello.pieces for host in head.pool.hosts.connected()] == [""]


def test_a_head_that_is_down_is_told_from_one_that_lets_nobody_in(home: Path, head: SmallHead) -> None:
    head.pair(home)
    RosterFile(head.roster.path).revoke("beta")
    time.sleep(0.15)  # It looks at its roster so often.
    out = checks_now()
    assert out["alpha: control"].state == "ok"
    assert out["alpha: membership"].state == "problem"
    assert "alpha has revoked this host" in out["alpha: membership"].what
    head.close()
    down = checks_now()
    assert down["head alpha"].state == "problem"
    assert f"{head.pairing_address}: the connection is refused" in down["head alpha"].what
    assert "discovery is switched off" in down["head alpha"].what
    assert "is potluck running on alpha" in down["head alpha"].hint


def test_another_version_is_said_with_who_must_update(home: Path, head: SmallHead) -> None:
    head.pair(home)
    head.protocol += 1
    found = checks_now()
    assert found["alpha: version"].state == "problem"
    assert "update Potluck on this host" in found["alpha: version"].hint
    assert "alpha: membership" not in found


def test_a_control_port_that_is_not_open_is_named(home: Path, head: SmallHead) -> None:
    head.pair(home)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        head.control_port = closed.getsockname()[1]
    found = checks_now()
    assert found["head alpha"].state == "ok"
    assert found["alpha: control"].state == "problem"
    assert str(head.control_port) in found["alpha: control"].what


def test_another_head_in_its_place_is_told(home: Path, head: SmallHead) -> None:
    load_keys(home / "identity")
    save_known_pool(home / "pools.json", msgspec.structs.replace(head.known(), key=new_key_pair().public))
    found = checks_now()["head alpha"]
    assert found.state == "problem"
    assert "another head answers there" in found.what


def test_a_broken_list_of_pools_is_a_problem_and_all_else_is_still_said(home: Path) -> None:
    (home / "pools.json").write_text("{")
    found = checks_now()
    assert found["pool"].state == "problem"
    assert "pair this host anew" in found["pool"].hint
    assert found["versions"].state == "ok"


@pytest.mark.parametrize(
    ("outcome", "words", "hint"),
    [
        ("refused", "nobody listens", "is potluck running on alpha"),
        ("timed out", "firewall", "guest network"),
        ("unreachable", "no way there", "switched on"),
        ("failed", "can't be connected", "alpha up"),
    ],
)
def test_each_way_of_not_reaching_the_head_has_its_own_advice(outcome: ConnectOutcome, words: str, hint: str) -> None:
    tried = HeadAttempt(
        address=POOL.doors[0], connection=ConnectResult(address="192.168.1.20", port=11501, outcome=outcome)
    )
    check = head_found_check(POOL, [tried], [])
    assert check.state == "problem"
    assert words in check.what
    assert "discovery finds it nowhere" in check.what
    assert hint in check.hint
    assert "--head" in check.hint
    assert control_check(POOL, ConnectResult(address="192.168.1.20", port=11502, outcome=outcome)).state == "problem"


def test_a_place_that_makes_no_sense_and_discovery_that_can_not_ask_are_said() -> None:
    tried = HeadAttempt(address="nowhere:1", problem=ConfigError("no host nowhere is known"))
    check = head_found_check(POOL, [tried], ConfigError("this host has no network to look for heads on"))
    assert "nowhere:1: no host nowhere is known; this host has no network" in check.what


STAY = MembershipProbe(
    accepted=NodeAccepted(name="beta", pool=POOL.pool, members=()),
    clock_off_s=0.0,
    port=40000,
    return_outcome="open",
    return_error="",
    speed=100e6,
    is_wifi=False,
)


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        ({}, "way back", "ok", "can connect"),
        ({"return_outcome": "timed out"}, "way back", "problem", "port 40000 of this host: no answer, so a firewall"),
        ({"return_outcome": "unreachable"}, "way back", "problem", "--lan-host"),
        ({"return_outcome": "failed", "return_error": "Strange"}, "way back", "problem", "(Strange)"),
        (
            {"return_outcome": DeadlineExceeded("the head did not say", hint="try again")},
            "way back",
            "problem",
            "did not say",
        ),
        ({"clock_off_s": -120.0}, "clock", "warning", "120 s behind"),
        ({"speed": 1e6, "is_wifi": True}, "link", "warning", "Wi-Fi"),
        ({"speed": DeadlineExceeded("nobody answers")}, "link", "problem", "nobody answers"),
    ],
)
def test_what_a_stay_shows(changes: dict[str, object], name: str, state: str, words: str) -> None:
    checks = membership_checks(POOL, replace(STAY, **changes), "open ufw")  # type: ignore[arg-type]
    check = next(check for check in checks if check.name == f"alpha: {name}")
    assert check.state == state
    assert words in f"{check.what} {check.hint}"
    if changes.get("return_outcome") in ("timed out", "unreachable", "failed"):
        assert "open ufw" in check.hint


def test_without_a_network_a_head_is_not_to_be_found_either(
    home: Path, head: SmallHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(timeout_s: float, pool_fingerprint: str | None) -> None:
        raise ConfigError("this host has no network to look for heads on")

    monkeypatch.setattr("devices.discovery.mdns.browse_pools", no_network)
    head.close()
    with pytest.raises(NotRunning, match="is not found") as raised:
        locate_head(head.known(), Settings())
    assert "potluck doctor" in raised.value.hint
