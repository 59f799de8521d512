"""Which piece is asked of whom."""

from __future__ import annotations

import time

from transport.messages.pieces import Piece, bitmap_of
from transport.messages.pool import PieceHint
from transport.pieces.fetch_plan import AWAY_PATIENCE_S, ENDGAME_IDLE_S, HINT_PATIENCE_S, FetchPlan

PIECES = {number: Piece(f"{number:064x}", 10) for number in range(6)}
HEAD, A, B = "head", "a", "b"
ALL = (A, B, HEAD)


def holding(*numbers: int) -> bytes:
    return bitmap_of([number in numbers for number in range(6)])


def plan_of(hints: list[PieceHint] | None = None, **held: bytes) -> FetchPlan:
    plan = FetchPlan(PIECES, ALL, hints or [], 0.0)
    for key, bitmap in {HEAD: holding(*range(6)), **held}.items():
        plan.update_have_list(key, bitmap, 0.0)
    return plan


def taken(plan: FetchPlan, key: str, now_s: float = 0.0, *, usable: tuple[str, ...] = ALL, idle_s: float = 0.0) -> str:
    """The numbers of all that it is asked for."""
    found = []
    while piece := plan.take(key, now_s, usable=usable, idle_s=idle_s):
        found.append(f"{int(piece.digest, 16)}")
    return "".join(found)


def test_pieces_are_taken_in_order_and_once() -> None:
    plan = plan_of()
    assert taken(plan, A) == ""
    assert taken(plan, HEAD) == "012345"
    assert taken(plan, HEAD, 100.0) == ""
    for piece in PIECES.values():
        assert not plan.is_done
        plan.note_done(piece.digest)
    assert plan.is_done


def test_what_another_host_has_is_not_asked_of_the_head() -> None:
    plan = plan_of(a=holding(1, 2), b=holding(2, 3))
    assert taken(plan, HEAD) == "045"
    assert taken(plan, B) == "23"
    assert taken(plan, A) == "1"


def test_the_head_gives_it_when_that_host_is_away_refused_slow_or_lacks_it() -> None:
    assert taken(plan_of(a=holding(0, 1)), HEAD, usable=(B, HEAD)) == "012345"
    refused = plan_of(a=holding(0, 1))
    refused.note_refused(A)
    assert taken(refused, HEAD) == "012345"
    assert taken(refused, A) == ""
    lacking = plan_of(a=holding(0, 1))
    lacking.note_missing(A, PIECES[1].digest)
    assert taken(lacking, HEAD) == "12345"


def test_the_head_does_its_part_of_what_others_give_slowly() -> None:
    plan = plan_of([PieceHint(A, 0, 4)], b=holding(4, 5))
    assert taken(plan, HEAD) == ""
    plan.note_useful(B, 60, 1.0)
    assert taken(plan, HEAD, 1.0, idle_s=ENDGAME_IDLE_S) == "", "others are fast enough"
    assert taken(plan, HEAD, 9.0, idle_s=ENDGAME_IDLE_S) == "5", "the last, since others begin with the first"
    assert taken(plan, HEAD, 9.5) == "4", "once it helps it goes on"
    plan.note_useful(A, 60, 9.5)
    assert taken(plan, HEAD, 10.0) == ""
    plan.note_missing(A, PIECES[0].digest)
    assert taken(plan, HEAD, 10.3) == "0"
    assert taken(plan, HEAD, 30.0) == "123", "nothing came of the hint"


def test_what_a_slow_host_has_begun_another_one_ends() -> None:
    plan = plan_of([PieceHint(A, 0, 6)], a=holding(0, 1), b=holding(1))
    assert taken(plan, A) == "01"
    assert plan.can_reassign(HEAD, PIECES[0].digest) and not plan.can_reassign(B, PIECES[0].digest)
    for piece in (PIECES[0], PIECES[1]):
        plan.mark_slow(A, piece.digest)
        plan.give_back(piece.digest)
    assert not plan.can_reassign(A, PIECES[0].digest)
    assert taken(plan, A, 1.0) == ""
    assert (taken(plan, HEAD, 1.0), taken(plan, B, 1.0)) == ("0", "1")
    plan.give_back(PIECES[0].digest)
    assert taken(plan, A, 2.0, usable=(A,)) == "0", "nobody else is left"


def test_what_a_hint_gives_to_another_host_is_waited_for_there() -> None:
    plan = plan_of([PieceHint(A, 2, 5)])
    assert taken(plan, HEAD) == "015"
    plan.update_have_list(A, holding(3), 1.0)
    assert taken(plan, A, 1.0) == "3"
    assert taken(plan, HEAD, 1.0 + HINT_PATIENCE_S - 0.1) == ""
    plan.note_useful(A, 1, 5.0)
    assert taken(plan, HEAD, 5.0 + HINT_PATIENCE_S - 0.1) == ""
    assert taken(plan, HEAD, 5.0 + HINT_PATIENCE_S + 0.5) == "24"


def test_a_hinted_host_that_is_away_is_not_waited_for_as_long() -> None:
    plan = plan_of([PieceHint(A, 0, 3), PieceHint("unknown", 3, 4)])
    assert taken(plan, HEAD, usable=(HEAD,)) == "345"
    assert taken(plan, HEAD, AWAY_PATIENCE_S + 0.1, usable=(HEAD,)) == "012"


def test_what_is_given_back_comes_first_soon() -> None:
    plan = plan_of()
    first = plan.take(HEAD, 0.0, usable=ALL, idle_s=0.0)
    assert first == PIECES[0]
    plan.give_back(first.digest)
    assert taken(plan, HEAD, 1.0) == "012345"


def test_the_head_is_asked_for_what_it_does_not_claim_and_then_it_is_nowhere() -> None:
    plan = plan_of(head=holding(1, 2, 3, 4, 5))
    assert plan.unavailable_piece(ALL) is None
    assert taken(plan, HEAD) == "012345"
    plan.note_missing(HEAD, PIECES[0].digest)
    plan.give_back(PIECES[0].digest)
    assert plan.unavailable_piece((A, HEAD)) is None, "b may have it"
    assert plan.unavailable_piece(ALL) == PIECES[0]
    assert taken(plan, HEAD) == ""
    plan.update_have_list(HEAD, holding(*range(6)), 1.0)
    assert plan.unavailable_piece(ALL) is None
    assert taken(plan, HEAD, 1.0) == "0"


def test_a_piece_that_is_listed_twice_is_wanted_once_and_had_by_who_has_either() -> None:
    twice = FetchPlan({0: PIECES[0], 4: PIECES[0]}, (A, HEAD), [], 0.0)
    twice.update_have_list(A, holding(4), 0.0)
    assert taken(twice, A, usable=(A, HEAD)) == "0"
    twice.note_done(PIECES[0].digest)
    assert twice.is_done


def test_what_a_peer_has_no_more_is_not_asked_of_it() -> None:
    twice = FetchPlan({0: PIECES[0], 1: PIECES[1], 4: PIECES[0]}, (A, HEAD), [], 0.0)
    twice.update_have_list(A, holding(0, 1, 4), 0.0)
    twice.update_have_list(A, holding(4), 1.0)
    assert taken(twice, A, 1.0, usable=(A, HEAD)) == "0"
    twice.give_back(PIECES[0].digest)
    twice.update_have_list(A, b"", 2.0)
    assert taken(twice, A, 2.0, usable=(A, HEAD)) == ""
    assert taken(twice, HEAD, 2.0, usable=(A, HEAD)) == "01"


def test_who_has_nothing_of_a_large_model_costs_nothing() -> None:
    """The network waits for the plan."""
    count = 20_000
    pieces = {number: Piece(f"{number:064x}", 10) for number in range(count)}
    plan = FetchPlan(pieces, ALL, [], 0.0)
    plan.update_have_list(HEAD, bitmap_of([True] * count), 0.0)
    plan.update_have_list(B, bitmap_of([False] * count), 0.0)
    began_s = time.process_time()
    for step in range(1000):
        assert plan.take(B, step * 1.0, usable=ALL, idle_s=0.0) is None
    assert time.process_time() - began_s < 1.0
