from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from devices.pairing.credentials import (
    CODE_LIFETIME_S,
    INVITE_LIFETIME_S,
    MAX_GUESSES,
    CredentialKind,
    PairingAttempt,
    PairingCodes,
    PairingRefusal,
    is_invite,
    parse_code,
    parse_invite,
)
from transport.errors import ConfigError
from transport.security.curve import new_key_pair

KEY = new_key_pair().public
POOL = "0123456789abcdef" * 2


def attempt(offered: PairingCodes, kind: CredentialKind = "code", now: float = 0.0) -> PairingAttempt:
    begun = offered.begin(kind, now=now)
    assert isinstance(begun, PairingAttempt)
    return begun


def reason(refused: PairingAttempt | PairingRefusal | None) -> str:
    assert isinstance(refused, PairingRefusal)
    return refused.reason


def offered_both() -> PairingCodes:
    offered = PairingCodes()
    offered.new_code(now=0.0)
    offered.new_invite("192.168.1.20", 11501, key=KEY, pool=POOL, now=0.0)
    return offered


def test_a_code_is_typed_in_any_way_that_people_type() -> None:
    for typed in ("7k3m9xq2", "7K3M-9XQ2", " 7k3m 9xq2\n", "7-k-3-m-9-x-q-2"):
        assert parse_code(typed) == "7K3M-9XQ2"
    assert parse_code("oil0-OIL1") == "0110-0111"


@pytest.mark.parametrize("typed", ["", "7k3m", "7k3m-9xq2-1", "7k3m-9xq!", "7k3m-9xqü", "ＡＡＡＡAAAA", "u" * 8])
def test_what_can_be_no_code_is_refused_before_it_costs_a_guess(typed: str) -> None:
    with pytest.raises(ConfigError, match="not a code"):
        parse_code(typed)


def test_codes_are_random_and_have_more_than_thirty_bits() -> None:
    offered = PairingCodes()
    codes = [offered.new_code(now=0.0).text for _ in range(300)]
    assert len(set(codes)) == 300
    seen = {char for code in codes for char in code} - {"-"}
    assert len(seen) == 32  # 5 bits for each of 8
    assert all(parse_code(code) == code for code in codes)


def test_an_invite_survives_being_printed_and_pasted() -> None:
    invite = PairingCodes().new_invite("192.168.1.20", 11501, key=KEY, pool=POOL, now=0.0)
    assert invite.url.startswith("potluck://192.168.1.20:11501?key=")
    assert parse_invite(f"  {invite.url}\n") == invite
    assert is_invite(invite.url)
    assert not is_invite("7K3M-9XQ2")
    assert invite.token not in repr(invite)


@given(st.binary(min_size=32, max_size=32).map(lambda number: z85.encode(number).decode()))
def test_every_key_survives_it(key: str) -> None:
    invite = PairingCodes().new_invite("10.0.0.1", 1, key=key, pool=POOL, now=0.0)
    assert parse_invite(invite.url).key == key


def test_half_an_invite_is_none_and_its_token_is_not_repeated() -> None:
    url = PairingCodes().new_invite("10.0.0.1", 11501, key=KEY, pool=POOL, now=0.0).url
    for length in range(len(url)):
        with pytest.raises(ConfigError, match="not an invite"):
            parse_invite(url[:length])
    with pytest.raises(ConfigError) as raised:
        parse_invite(url.replace("pool=", "pol="))
    assert parse_invite(url).token not in str(raised.value)


@given(st.text(max_size=80))
def test_whatever_is_pasted_is_an_invite_or_an_error_with_a_hint(text: str) -> None:
    for pasted in (text, f"potluck://{text}", f"potluck://10.0.0.1:1?{text}", f"potluck://10.0.0.1:{text}"):
        with pytest.raises(ConfigError) as raised:
            parse_invite(pasted)
        assert raised.value.hint


def test_nothing_is_on_offer_before_it_is_made() -> None:
    assert reason(PairingCodes().begin("code", now=0.0)) == "none"
    assert reason(PairingCodes().begin("invite", now=0.0)) == "none"


@pytest.mark.parametrize("kind", ["code", "invite"])
def test_a_secret_is_good_for_one_pairing(kind: CredentialKind) -> None:
    offered = offered_both()
    assert offered.verify(attempt(offered, kind), is_right=True, now=1.0) is None
    assert reason(offered.begin(kind, now=2.0)) == "used"


@pytest.mark.parametrize("kind", ["code", "invite"])
def test_of_two_at_once_one_gets_in(kind: CredentialKind) -> None:
    offered = offered_both()
    one, other = attempt(offered, kind), attempt(offered, kind)
    assert offered.verify(other, is_right=True, now=1.0) is None
    assert reason(offered.verify(one, is_right=True, now=1.0)) == "used"


@pytest.mark.parametrize(("kind", "lifetime_s"), [("code", CODE_LIFETIME_S), ("invite", INVITE_LIFETIME_S)])
def test_a_secret_ends_with_its_time_also_during_an_exchange(kind: CredentialKind, lifetime_s: float) -> None:
    offered = offered_both()
    begun = attempt(offered, kind, now=lifetime_s - 1.0)
    assert reason(offered.begin(kind, now=lifetime_s)) == "expired"
    assert reason(offered.verify(begun, is_right=True, now=lifetime_s)) == "expired"


def test_three_wrong_guesses_lock_a_code_until_there_is_a_new_one() -> None:
    offered = offered_both()
    refusals = [offered.verify(attempt(offered), is_right=False, now=1.0) for _ in range(MAX_GUESSES)]
    assert [(r.reason, r.guesses_left) for r in refusals if r is not None] == [
        ("wrong", 2),
        ("wrong", 1),
        ("locked", 0),
    ]
    assert reason(offered.begin("code", now=2.0)) == "locked"
    offered.new_code(now=3.0)
    assert offered.verify(attempt(offered, now=4.0), is_right=True, now=4.0) is None


def test_guesses_that_are_broken_off_count() -> None:
    offered = offered_both()
    for _ in range(MAX_GUESSES):
        attempt(offered)
    assert reason(offered.begin("code", now=0.0)) == "locked"


def test_the_third_guess_may_be_the_right_one() -> None:
    offered = offered_both()
    for _ in range(MAX_GUESSES - 1):
        offered.verify(attempt(offered), is_right=False, now=1.0)
    assert offered.verify(attempt(offered), is_right=True, now=1.0) is None


def test_an_invite_can_not_be_locked_by_strangers() -> None:
    offered = offered_both()
    for _ in range(100):
        assert reason(offered.verify(attempt(offered, "invite"), is_right=False, now=1.0)) == "wrong"
    assert offered.verify(attempt(offered, "invite"), is_right=True, now=1.0) is None


def test_a_new_secret_makes_the_one_before_void_also_during_an_exchange() -> None:
    offered = offered_both()
    begun = attempt(offered)
    offered.new_code(now=1.0)
    assert reason(offered.verify(begun, is_right=True, now=1.0)) == "expired"
    assert offered.verify(attempt(offered, now=1.0), is_right=True, now=1.0) is None
