from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck.engine.detokenizer import StopFilter

_TEXT = st.text(alphabet="abc", max_size=30)
_STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def _oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first time the text ends with a stop string, cut the longest that it ends with."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def _stream(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    filter_, out = StopFilter(stops), ""
    for piece in pieces:
        ready, is_stopped = filter_.push(piece)
        out += ready
        if is_stopped:
            return out, True
    return out + filter_.flush(), False


@given(st.lists(_TEXT, max_size=8), _STOPS)
def test_any_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    assert _stream(pieces, stops) == _oracle("".join(pieces), stops)


@given(_TEXT, _STOPS)
def test_holds_back_only_what_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    if _oracle(text, stops)[1]:
        return
    ready, _ = StopFilter(stops).push(text)
    held = text[len(ready) :]
    assert held == max(
        (text[start:] for start in range(len(text)) if any(stop.startswith(text[start:]) for stop in stops)),
        key=len,
        default="",
    )


def test_without_stop_strings_nothing_waits() -> None:
    assert StopFilter(()).push("text") == ("text", False)
