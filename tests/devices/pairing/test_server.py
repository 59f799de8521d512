"""Hosts at a real pairing server, on loopback addresses: those who pair and those who guess."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from devices.pairing.client import check_version, fetch_pool_info
from devices.pairing.credentials import parse_invite
from devices.pairing.identity import fingerprint
from devices.pairing.json_lines import JsonLineSocket
from devices.pairing.known_pools import KnownPool
from devices.pairing.pake import HeadMessage, JoinerPake, PairingHello
from devices.pairing.roster import RosterFile, clean_name
from devices.pairing.server import Candidate, PairingServer, PoolInfo
from tests.support.devices.pairing_head import HEAD, JOINER, House, connection, guests, is_hung_up, other_code, until
from transport.errors import (
    ConfigError,
    DeadlineExceeded,
    PairingFailed,
    PortInUse,
    VersionMismatch,
)
from transport.messages.ring import PROTOCOL_VERSION
from transport.security.curve import new_key_pair
from transport.timeouts import CODE_LIFETIME_S, INVITE_LIFETIME_S


def test_anyone_may_ask_who_is_there(house: House) -> None:
    assert fetch_pool_info("127.0.0.1", house.door.port) == house.facts


def test_what_a_head_calls_itself_can_not_command_the_terminal(house: House) -> None:
    name = "den \x1b[2J[bold]\u202e" + "x" * 100
    house.facts = replace(house.facts, name=name, potluck="1.0\x1b[31m")
    waited: list[PoolInfo] = []
    pool = house.pair(str(house.door.new_code()), on_waiting=waited.append)
    for facts in (fetch_pool_info("127.0.0.1", house.door.port), *waited):
        assert facts.name == pool.name == clean_name(name[:64])
        assert facts.potluck.isprintable()


@pytest.mark.parametrize("by", ["code", "invite"])
def test_a_host_pairs_and_both_remember(house: House, by: str) -> None:
    credential = str(house.door.new_code()).lower() if by == "code" else parse_invite(house.door.new_invite().url)
    waited: list[PoolInfo] = []
    pool = house.pair(credential, on_waiting=waited.append)
    assert pool == KnownPool(
        pool=house.facts.pool, key=HEAD.public, name="den", my_name="mac", doors=(f"127.0.0.1:{house.door.port}",)
    )
    assert waited == [house.facts]
    assert [(candidate.name, candidate.key, candidate.address) for candidate in house.asked] == [
        ("mac", JOINER.public, "127.0.0.1")
    ]
    member = RosterFile(house.roster.path).member(JOINER.public)
    assert member is not None
    assert (member.name, member.platform) == ("mac", "macOS arm64")
    assert house.heard == [f"mac (key {fingerprint(JOINER.public)}) has paired"]


@pytest.mark.parametrize("by", ["code", "invite"])
def test_a_second_use_fails(house: House, by: str) -> None:
    credential = str(house.door.new_code()) if by == "code" else house.door.new_invite()
    house.pair(credential)
    second = new_key_pair()
    with pytest.raises(PairingFailed, match=f"the {by} was used already") as raised:
        house.pair(credential, keys=second)
    assert "potluck invite" in raised.value.hint
    assert not house.roster.admits(second.public)


def test_three_wrong_guesses_lock_the_code_and_everyone_is_told(house: House) -> None:
    code = str(house.door.new_code())
    for said in ("guesses left: 2", "guesses left: 1", "locked"):
        with pytest.raises(PairingFailed, match=said):
            house.pair(other_code(code))
    with pytest.raises(PairingFailed, match="locked after 3 guesses"):
        house.pair(code)
    assert not house.asked
    assert len(house.heard) == 3
    assert "locked now" in house.heard[-1]
    assert house.pair(str(house.door.new_code())).my_name == "mac"


def test_who_locks_every_code_can_not_lock_an_invite(house: House) -> None:
    """Guesses at its 128 bits are not counted. Whoever is bothered so is told to use it, on both sides."""
    code = str(house.door.new_code())
    invite = house.door.new_invite()
    wrong = dataclasses.replace(invite, token="0" * 32)
    for guess in (other_code(code), other_code(code), other_code(code), wrong, wrong, wrong, wrong):
        with pytest.raises(PairingFailed):
            house.pair(guess, keys=new_key_pair(), name="stranger")
    assert "potluck invite" in house.heard[2] and "can't be locked" in house.heard[2]
    with pytest.raises(PairingFailed, match="locked") as raised:
        house.pair(code)
    assert "use the invite" in raised.value.hint
    assert house.pair(invite).my_name == "mac"


def test_a_guess_that_is_broken_off_counts_and_is_told(house: House) -> None:
    code = str(house.door.new_code())
    for _ in range(3):
        with contextlib.closing(connection(house)) as sock:
            lines = JsonLineSocket(sock)
            lines.send(PairingHello(protocol=PROTOCOL_VERSION, potluck="1"), 60.0)
            facts = lines.receive(PoolInfo, 60.0)
            side = JoinerPake(code, facts, kind="code", key=JOINER.public, name="x", platform="y")
            lines.send(side.start, 60.0)
            side.confirm(lines.receive(HeadMessage, 60.0))  # type: ignore[arg-type]
    with pytest.raises(PairingFailed, match="locked"):
        house.pair(code)
    assert len(house.heard) == 3


def test_a_guess_that_is_broken_off_too_late_is_no_matter(house: House) -> None:
    code = str(house.door.new_code())
    with contextlib.closing(connection(house)) as sock:
        lines = JsonLineSocket(sock)
        lines.send(PairingHello(protocol=PROTOCOL_VERSION, potluck="1"), 60.0)
        facts = lines.receive(PoolInfo, 60.0)
        lines.send(JoinerPake(code, facts, kind="code", key=JOINER.public, name="x", platform="y").start, 60.0)
        lines.receive(HeadMessage, 60.0)  # type: ignore[arg-type]
        house.now += CODE_LIFETIME_S + 1.0
    until(lambda: guests() == 0)
    assert not house.heard


def test_points_that_are_none_do_not_use_up_guesses(house: House) -> None:
    code = str(house.door.new_code())
    for point in (bytes(32), bytes(31) + b"\x01", b"\x01" + bytes(31), b"\xff" * 32):
        with contextlib.closing(connection(house)) as sock:
            lines = JsonLineSocket(sock)
            lines.send(PairingHello(protocol=PROTOCOL_VERSION, potluck="1"), 60.0)
            side = JoinerPake(
                code, lines.receive(PoolInfo, 60.0), kind="code", key=JOINER.public, name="x", platform="y"
            )
            lines.send(replace(side.start, spake=b"A" + point), 60.0)
            assert is_hung_up(sock)
    assert not house.heard
    assert house.pair(code).my_name == "mac"


@pytest.mark.parametrize(("by", "lifetime_s"), [("code", CODE_LIFETIME_S), ("invite", INVITE_LIFETIME_S)])
def test_what_is_too_old_is_refused(house: House, by: str, lifetime_s: float) -> None:
    credential = str(house.door.new_code()) if by == "code" else house.door.new_invite()
    house.now += lifetime_s
    with pytest.raises(PairingFailed, match="too old"):
        house.pair(credential)


def test_without_a_code_there_is_none_to_guess(house: House) -> None:
    with pytest.raises(PairingFailed, match="has given out no code"):
        house.pair("7K3M-9XQ2")


def test_the_heads_user_decides(house: House) -> None:
    def nobody(candidate: Candidate) -> bool:
        raise DeadlineExceeded("nobody said")

    house.answer = lambda candidate: False
    with pytest.raises(PairingFailed, match="den refused this host"):
        house.pair(str(house.door.new_code()))
    house.answer = nobody
    with pytest.raises(PairingFailed, match="nobody let this host in"):
        house.pair(str(house.door.new_code()))
    assert house.roster.keys() == ()


def test_a_code_is_used_also_when_the_user_says_no(house: House) -> None:
    house.answer = lambda candidate: False
    code = str(house.door.new_code())
    for said in ("refused", "used already"):
        with pytest.raises(PairingFailed, match=said):
            house.pair(code)


def test_a_joiner_waits_for_the_user_longer_than_for_a_line(impatient: House) -> None:
    impatient.answer = lambda candidate: not candidate.gone.wait(3.0)
    assert impatient.pair(str(impatient.door.new_code())).my_name == "mac"


def test_a_joiner_that_has_waited_long_enough_gives_up_and_is_not_let_in(house: House) -> None:
    house.answer = lambda candidate: candidate.gone.wait(120.0)
    with pytest.raises(PairingFailed, match=r"(silent|nobody let this host in)"):
        house.pair(str(house.door.new_code()), decision_timeout_s=0.3)
    until(lambda: house.asked and house.asked[0].gone.is_set())
    assert house.roster.keys() == ()


def test_an_invite_of_another_head_is_noticed_before_anything_is_said(house: House) -> None:
    invite = house.door.new_invite()
    with pytest.raises(PairingFailed, match="another head"):
        house.pair(replace_key(invite.url))
    house.facts = replace(house.facts, key=new_key_pair().public)  # someone answers in the head's place
    with pytest.raises(PairingFailed, match="another head"):
        house.pair(invite)
    assert not house.heard


def replace_key(url: str) -> Any:
    invite = parse_invite(url)
    return type(invite)(
        host=invite.host, port=invite.port, key=new_key_pair().public, token=invite.token, pool=invite.pool
    )


def test_a_head_does_not_pair_with_itself(house: House) -> None:
    with pytest.raises(PairingFailed, match="this host itself"):
        house.pair(str(house.door.new_code()), keys=HEAD)


def test_hosts_of_different_versions_say_which_one_to_update(house: House) -> None:
    code = str(house.door.new_code())
    for protocol, older in ((PROTOCOL_VERSION + 1, "on this host"), (PROTOCOL_VERSION - 1, r"on the head \(den\)")):
        house.facts = replace(house.facts, protocol=protocol)
        with pytest.raises(VersionMismatch, match=older) as raised:
            house.pair(code)
        assert f"protocol {protocol}" in raised.value.message
        assert f"protocol {PROTOCOL_VERSION}" in raised.value.message
        assert "9.9" in raised.value.message
        with pytest.raises(VersionMismatch):
            check_version(fetch_pool_info("127.0.0.1", house.door.port))
    house.facts = replace(house.facts, protocol=PROTOCOL_VERSION)
    assert house.pair(code).my_name == "mac"


def test_a_joiner_of_another_version_is_told_so(house: House) -> None:
    code = str(house.door.new_code())
    with contextlib.closing(connection(house)) as sock:
        lines = JsonLineSocket(sock)
        lines.send(PairingHello(protocol=PROTOCOL_VERSION + 1, potluck="10"), 60.0)
        side = JoinerPake(
            code, lines.receive(PoolInfo, 60.0), kind="code", key=JOINER.public, name="mac", platform="Linux"
        )
        lines.send(side.start, 60.0)
        assert msgspec.json.decode(lines.receive_line(60.0))["reason"] == "version"


def test_closing_hangs_up_on_who_waits_and_frees_the_port(house: House) -> None:
    house.answer = lambda candidate: candidate.gone.wait(120.0)
    code = str(house.door.new_code())
    with contextlib.closing(connection(house)) as idle, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(house.pair, code)
        until(lambda: house.asked)
        house.door.close()
        assert is_hung_up(idle)
        with pytest.raises(PairingFailed, match="closed the connection"):
            waiting.result(60.0)
    assert house.asked[0].gone.is_set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("pairing")])
    socket.create_server(("127.0.0.1", house.door.port)).close()


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_and_the_usual_one_is_not(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def door(port: int | None) -> PairingServer:
        return PairingServer(
            "127.0.0.1",
            port,
            pool_info=lambda: house.facts,
            roster=house.roster,
            keys=HEAD,
            approve=lambda candidate: False,
            notify=house.heard.append,
        )

    with pytest.raises(PortInUse, match=str(house.door.port)) as raised:
        door(house.door.port)
    assert "--lan-port" in raised.value.hint
    monkeypatch.setattr("devices.pairing.server.PAIRING_PORT", house.door.port)
    another = door(None)
    assert another.port not in (0, house.door.port)
    another.close()


def test_an_address_that_is_not_this_hosts_is_an_error(house: House) -> None:
    with pytest.raises(ConfigError, match="can't listen at"):
        PairingServer(
            "203.0.113.7",
            0,
            pool_info=lambda: house.facts,
            roster=house.roster,
            keys=HEAD,
            approve=lambda candidate: False,
            notify=house.heard.append,
        )


def test_a_roster_that_can_not_be_written_lets_nobody_in_and_both_are_told(house: House) -> None:
    code = str(house.door.new_code())
    house.roster.path.write_text("{")
    with pytest.raises(PairingFailed, match="could not take this host in"):
        house.pair(code)
    assert "could not be let in" in house.heard[0]
