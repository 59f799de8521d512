"""Who takes what from the head when several hosts need the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transport.messages.pool import PieceHint
from transport.pieces.assignment import assign_pieces


def taken_from_head(needs: dict[str, list[int]], hints: dict[str, tuple[PieceHint, ...]]) -> dict[str, list[int]]:
    return {
        host: [i for i in indexes if not any(hint.first <= i < hint.last for hint in hints[host])]
        for host, indexes in needs.items()
    }


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 29), max_size=30), max_size=4),
    st.lists(st.integers(0, 100), min_size=30, max_size=30),
)
def test_the_head_gives_every_piece_once_and_hints_lead_to_who_takes_it(
    needs: dict[str, list[int]], sizes: list[int]
) -> None:
    hints = assign_pieces(needs, sizes)
    taken = {host: set(indexes) for host, indexes in taken_from_head(needs, hints).items()}
    for index in {index for indexes in needs.values() for index in indexes}:
        assert sum(index in indexes for indexes in taken.values()) == 1
    for host, given_to in hints.items():
        for hint in given_to:
            assert hint.peer != host
            for index in range(hint.first, hint.last):
                assert index in taken[hint.peer] or index not in needs[host]


def test_two_hosts_with_the_same_needs_take_half_each() -> None:
    hints = assign_pieces({"a": list(range(10)), "b": list(range(10))}, [100] * 10)
    assert hints == {"a": (PieceHint("b", 5, 10),), "b": (PieceHint("a", 0, 5),)}


def test_who_has_much_of_its_own_to_take_takes_less_for_others() -> None:
    needs = {"a": list(range(20)), "b": list(range(10, 20)), "c": list(range(10, 20))}
    taken = taken_from_head(needs, assign_pieces(needs, [10] * 20))
    assert taken["a"] == list(range(10))
    assert len(taken["b"]) == len(taken["c"]) == 5


def test_what_nobody_shares_has_no_hints() -> None:
    assert assign_pieces({"a": [0, 1], "b": [2]}, [1, 1, 1]) == {"a": (), "b": ()}
    assert assign_pieces({}, []) == {}
