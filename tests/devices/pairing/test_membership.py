"""A host asks whether it is still a member: its head says so and proves who it is; nobody else learns or says it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from devices.pairing.client import fetch_membership
from devices.pairing.json_lines import JsonLineSocket
from devices.pairing.known_pools import KnownPool
from devices.pairing.membership import StatusReply, StatusRequest, new_status_request, prove_status, verify_status
from devices.pairing.pake import PairingHello, PoolInfo
from devices.pairing.roster import RosterFile
from tests.support.devices.pairing_head import HEAD, JOINER, House, connection, is_hung_up
from transport.errors import BadMessage, NotRunning
from transport.security.curve import new_key_pair

OTHER = new_key_pair()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "roster.json")
    yield made
    made.door.close()


def pool_of(house: House) -> KnownPool:
    return KnownPool(pool=house.facts.pool, key=HEAD.public, name="den", my_name="mac")


def asked(house: House, port: int | None = None) -> str:
    facts, word = fetch_membership("127.0.0.1", port or house.door.port, pool_of(house), keys=JOINER)
    assert facts == house.facts
    return word


def test_a_host_is_told_whether_it_counts(house: House) -> None:
    assert asked(house) == "unknown"
    house.roster.add(JOINER.public, "mac", "macOS")
    assert asked(house) == "member"
    house.roster.revoke("mac")
    assert asked(house) == "revoked"


def test_a_host_of_another_version_is_told_too(house: House) -> None:
    house.roster.add(JOINER.public, "mac", "macOS")
    house.facts = replace(house.facts, protocol=house.facts.protocol + 1)
    assert asked(house) == "member"


def standing(house: House, ask: StatusRequest) -> StatusReply:
    lines = JsonLineSocket(connection(house))
    try:
        lines.send(PairingHello(protocol=1, potluck="1"), 5.0)
        lines.receive(PoolInfo, 5.0)
        lines.send(ask, 5.0)
        return lines.receive(StatusReply, 5.0)
    finally:
        lines.close()


def test_nobody_learns_whether_another_ones_key_counts(house: House) -> None:
    """Also not by asking the same twice, before and after something has changed."""
    house.roster.add(JOINER.public, "mac", "macOS")
    ask = new_status_request(JOINER)
    answers = [standing(house, ask) for _ in range(2)]
    assert answers[0].nonce != answers[1].nonce
    assert answers[0].proof != answers[1].proof
    told = msgspec.json.encode(house.facts)
    assert [verify_status(answer, ask, told, HEAD.public, JOINER) for answer in answers] == ["member"] * 2
    for answer in answers:
        with pytest.raises(BadMessage):
            verify_status(answer, ask, told, HEAD.public, OTHER)


def test_nobody_answers_in_the_heads_place(tmp_path: Path) -> None:
    """Not with its own keys, nor with what the head said before, nor with other facts."""
    roster = RosterFile(tmp_path / "roster.json", name="den")
    roster.add(JOINER.public, "mac", "macOS")
    pool = roster.read().pool
    facts = PoolInfo(pool=pool, name="den", key=HEAD.public, protocol=1, potluck="1", control_port=5)
    told = msgspec.json.encode(facts)
    ask, earlier = new_status_request(JOINER), new_status_request(JOINER)
    answer = prove_status(ask, told, roster.read(), HEAD)
    assert verify_status(answer, ask, told, HEAD.public, JOINER) == "member"
    forged = prove_status(ask, told, roster.read(), OTHER)
    replayed = prove_status(earlier, told, roster.read(), HEAD)
    for wrong in (forged, replayed, replace(answer, nonce=replayed.nonce)):
        with pytest.raises(BadMessage):
            verify_status(wrong, ask, told, HEAD.public, JOINER)
    for other in (replace(facts, control_port=6), replace(facts, name="dan"), replace(facts, pool="ab" * 16)):
        with pytest.raises(BadMessage):
            verify_status(answer, ask, msgspec.json.encode(other), HEAD.public, JOINER)


def test_a_head_that_tells_more_than_this_host_knows_is_still_proven(house: House) -> None:
    """One of a later version: else its host would never hear why they don't understand each other."""

    class LaterFacts(msgspec.Struct, kw_only=True, tag="door"):
        pool: str
        name: str
        key: str
        protocol: int
        potluck: str
        control_port: int
        more: str = "than this one knows"

    house.roster.add(JOINER.public, "mac", "macOS")
    known = house.facts
    house.facts = LaterFacts(**msgspec.structs.asdict(known))  # type: ignore[assignment]
    facts, word = fetch_membership("127.0.0.1", house.door.port, pool_of(house), keys=JOINER)
    assert (facts, word) == (known, "member")


@pytest.mark.parametrize("key", ["0" * 40, "#" * 40, "rq%pe" + "0" * 35])
def test_keys_that_are_none_are_hung_up_on(house: House, key: str) -> None:
    """The second is no number of 32 bytes; the first is a point that would give everybody the same secret."""
    sock = connection(house)
    lines = JsonLineSocket(sock)
    lines.send(PairingHello(protocol=1, potluck="1"), 5.0)
    lines.receive(PoolInfo, 5.0)
    lines.send(StatusRequest(key=key, nonce=bytes(32)), 5.0)
    if key.startswith("rq"):  # Any other point: an answer that nobody understands.
        lines.receive(StatusReply, 5.0)
    assert is_hung_up(sock)
    lines.close()
    assert not house.heard


def door_that_says(*messages: msgspec.Struct) -> int:
    """To one who knocks; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listener, listener.accept()[0] as sock:
            lines = JsonLineSocket(sock)
            for message in messages:
                lines.receive_line(5.0)
                lines.send(message, 5.0)

    threading.Thread(target=answer, daemon=True).start()
    return int(listener.getsockname()[1])


def test_who_only_claims_to_be_the_head_is_not_believed(house: House) -> None:
    lies = StatusReply(nonce=bytes(32), proof=bytes(32))
    for port in (door_that_says(house.facts, lies), door_that_says(house.facts)):
        with pytest.raises(NotRunning, match="does not prove that it is den"):
            asked(house, port)
    with pytest.raises(NotRunning, match="another head than den"):
        asked(house, door_that_says(replace(house.facts, key=OTHER.public)))


def test_a_version_that_nobody_has_proved_is_no_reason_to_give_up(house: House) -> None:
    class Strange(msgspec.Struct):
        protocol: int = 99
        potluck: str = "99"

    with pytest.raises(NotRunning, match="protocol 99"):
        asked(house, door_that_says(Strange()))
