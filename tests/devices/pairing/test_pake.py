"""The exchange as values, with and without someone in between."""

from __future__ import annotations

import contextlib
import hashlib
import hmac

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from devices.pairing.json_lines import decode_line
from devices.pairing.pake import (
    HeadMessage,
    HeadPake,
    JoinerMessage,
    JoinerPake,
    PairingHello,
    PairingOutcome,
    PakeConfirm,
    PakeConfirmed,
    PakeReply,
    PakeStart,
    PoolInfo,
)
from transport.errors import BadMessage
from transport.security.curve import new_key_pair

HEAD, JOINER, MALLORY = (new_key_pair().public for _ in range(3))
FACTS = PoolInfo(pool="ab" * 16, name="den", key=HEAD, protocol=5, potluck="0.1.0", control_port=11502)
CODE = "7K3M-9XQ2"


def joiner(secret: str = CODE, facts: PoolInfo = FACTS) -> JoinerPake:
    return JoinerPake(secret, facts, kind="code", key=JOINER, name="mac", platform="macOS arm64")


def agree(
    joining: JoinerPake, facts: PoolInfo = FACTS, *, begin: PakeStart | None = None
) -> tuple[HeadPake, bool, bool]:
    """The head's side, and whether head and joiner find the other's proof right."""
    head = HeadPake(CODE, facts, begin or joining.start)
    confirm = joining.confirm(head.reply)
    return head, head.verify(confirm), joining.verify(head.confirmed())


def test_who_knows_the_secret_is_let_in_and_knows_that_it_was_the_head() -> None:
    joining = joiner()
    head, head_is_sure, joiner_is_sure = agree(joining)
    assert head_is_sure
    assert joiner_is_sure
    outcome = PairingOutcome(decision="allowed", name="mac-2")
    assert joining.outcome(head.result(outcome)) == outcome


def test_another_secret_convinces_nobody() -> None:
    assert agree(joiner("7K3M-9XQ3"))[1:] == (False, False)


@pytest.mark.parametrize(
    "seen",
    [
        replace(FACTS, key=MALLORY),
        replace(FACTS, name="attic"),
        replace(FACTS, pool="cd" * 16),
        replace(FACTS, control_port=6666),
        replace(FACTS, protocol=4),
    ],
)
def test_someone_between_who_changes_what_the_head_says_is_noticed_by_both(seen: PoolInfo) -> None:
    assert agree(joiner(facts=seen))[1:] == (False, False)


@pytest.mark.parametrize("change", [{"key": MALLORY}, {"name": "pc"}, {"platform": "Linux"}, {"kind": "invite"}])
def test_someone_between_who_changes_what_the_joiner_says_is_noticed_by_both(change: dict[str, str]) -> None:
    joining = joiner()
    assert agree(joining, begin=replace(joining.start, **change))[1:] == (False, False)


def test_someone_between_can_not_change_the_result() -> None:
    joining = joiner()
    head, *_ = agree(joining)
    result = head.result(PairingOutcome(decision="refused"))
    forged = msgspec.json.encode(PairingOutcome(decision="allowed", name="mac"))
    with pytest.raises(BadMessage, match="does not come from the head"):
        joining.outcome(replace(result, body=forged))


def test_proofs_of_one_exchange_are_worth_nothing_in_another() -> None:
    old = joiner()
    old_head = HeadPake(CODE, FACTS, old.start)
    old_confirm = old.confirm(old_head.reply)
    assert not HeadPake(CODE, FACTS, old.start).verify(old_confirm)
    assert not HeadPake(CODE, FACTS, joiner().start).verify(old_confirm)


def test_the_heads_own_proof_sent_back_proves_nothing() -> None:
    head = HeadPake(CODE, FACTS, joiner().start)
    assert not head.verify(PakeConfirm(proof=head.confirmed().proof))


@given(st.binary(min_size=33, max_size=33))
@example(bytes(33))
@example(b"A" + bytes(32))
@example(b"A\x01" + bytes(31))  # the neutral element
@example(b"A" + b"\xff" * 32)
@example(b"A" + bytes(31) + b"\x01")  # not on the curve
@example(b"A" + b"\xec" + b"\xff" * 30 + b"\x7f")  # of order 2
@example(b"B" + bytes(32))
@settings(max_examples=30, deadline=None)
def test_a_point_that_is_none_is_refused(spake: bytes) -> None:
    joining = joiner()
    with contextlib.suppress(BadMessage):
        assert not HeadPake(CODE, FACTS, replace(joining.start, spake=spake)).verify(PakeConfirm(proof=bytes(32)))
    with contextlib.suppress(BadMessage):
        joining.confirm(PakeReply(spake=spake))
    assert not joining.verify(HeadPake(CODE, FACTS, joining.start).confirmed())


def test_a_proof_by_no_session_key_convinces_nobody() -> None:
    empty = hmac.new(b"", b"head\0", hashlib.sha256).digest()
    assert not joiner().verify(PakeConfirmed(proof=empty))


LINES = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=300).map(str.encode),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["type", "key", "name", "kind", "platform", "spake", "proof", "protocol", "potluck", "x"]
                ),
                inner | st.sampled_from(["hello", "begin", "confirm", "door", "answer", "result", "A" * 40, "A" * 44]),
            )
        ),
        max_leaves=12,
    ).map(msgspec.json.encode),
)


@given(LINES)
@example(b"[" * 4096)
@example(b'{"a":' * 800)
@example(b'{"type":"hello","protocol":1,"potluck":"","x":' + b"[" * 4000)
@example(b'{"type":"hello","protocol":1e400,"potluck":""}')
@example(b'{"type":"hello","protocol":' + b"9" * 4000 + b"}")
@example(b'{"type":"hello","protocol":1,"potluck":"\\ud800"}')
@settings(max_examples=150, deadline=None)
def test_whatever_comes_in_is_a_message_or_is_refused(line: bytes) -> None:
    for kind in (PairingHello, PakeStart, PakeConfirm, JoinerMessage, HeadMessage, PairingOutcome):
        try:
            message = decode_line(line, kind)  # type: ignore[arg-type]
        except BadMessage:
            continue
        assert isinstance(message, msgspec.Struct)
        assert len(msgspec.json.encode(message)) <= 4096
