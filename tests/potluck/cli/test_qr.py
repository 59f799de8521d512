from __future__ import annotations

import segno

from potluck.cli.invitation import qr_lines

DARK = {"█": (False, False), "▀": (False, True), "▄": (True, False), " ": (True, True)}


def test_the_lines_are_the_modules_of_the_code_with_a_light_margin() -> None:
    text = "potluck://192.168.178.20:11501?key=" + "%3F" * 20 + "&token=" + "0f" * 16
    lines = qr_lines(text)
    rows = [row for line in lines for row in zip(*(DARK[char] for char in line), strict=True)]
    expected = [
        tuple(bool(module) for module in row)
        for row in segno.make(text, error="l", micro=False, boost_error=False).matrix_iter(border=2)
    ]
    assert rows[: len(expected)] == expected
    assert len({len(line) for line in lines}) == 1
    assert not any(any(row) for row in rows[:2])
