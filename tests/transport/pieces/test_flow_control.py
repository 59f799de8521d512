"""How much is requested at a time, on links of any speed."""

from __future__ import annotations

import pytest

from transport.messages.pieces import PART_BYTES
from transport.pieces.flow_control import INITIAL_WINDOW_BYTES, MAX_WINDOW_BYTES, MIN_WINDOW_BYTES, RequestWindow


def run(window: RequestWindow, *, bytes_per_s: float, round_trip_s: float, seconds: float) -> float:
    """A link that is full or limited by the window; the rate at the end."""
    now_s, rate = 0.0, 0.0
    window.note_received(PART_BYTES, now_s)
    while now_s < seconds:
        rate = min(bytes_per_s, window.num_bytes / round_trip_s)
        now_s += window.part_bytes / rate
        window.note_full()
        window.note_received(window.part_bytes, now_s)
    return rate


@pytest.mark.parametrize(
    ("bytes_per_s", "round_trip_s"), [(125e6, 0.010), (125e6, 0.030), (12.5e6, 0.1), (1.25e6, 0.005), (300e6, 0.0005)]
)
def test_it_grows_until_the_link_is_full_and_no_further(bytes_per_s: float, round_trip_s: float) -> None:
    window = RequestWindow()
    rate = run(window, bytes_per_s=bytes_per_s, round_trip_s=round_trip_s, seconds=4.5)
    assert rate > 0.9 * bytes_per_s
    needed = max(INITIAL_WINDOW_BYTES, bytes_per_s * round_trip_s)
    assert window.num_bytes <= min(MAX_WINDOW_BYTES, 4 * needed)


def test_on_a_slow_link_little_is_outstanding_and_parts_are_small() -> None:
    window = RequestWindow()
    run(window, bytes_per_s=100e3, round_trip_s=0.02, seconds=300.0)
    assert window.num_bytes < 3 * 100e3
    assert window.part_bytes < PART_BYTES


def test_after_silence_it_begins_small() -> None:
    window = RequestWindow()
    window.note_silence()
    assert window.num_bytes == MIN_WINDOW_BYTES
    assert run(window, bytes_per_s=125e6, round_trip_s=0.005, seconds=20.0) > 0.5 * 125e6


def test_pauses_of_who_asks_are_not_the_links() -> None:
    window = RequestWindow()
    now_s = 0.0
    for _ in range(100):
        window.note_received(PART_BYTES, now_s)
        window.note_idle()
        now_s += 60.0
    assert window.num_bytes == INITIAL_WINDOW_BYTES and window.part_bytes == PART_BYTES
