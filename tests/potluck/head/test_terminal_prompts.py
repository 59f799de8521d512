from __future__ import annotations

import os
import sys

import pytest

from potluck.head.approvals import TerminalPrompts

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no terminals that can be waited for")


def test_lines_that_were_typed_after_the_question() -> None:
    user, ours = os.openpty()
    answers = TerminalPrompts(ours)
    os.write(user, b"yes\n")
    while answers.line(5.0) is None:
        pass
    os.write(user, b"too early\n")
    answers.discard()
    assert answers.line(0.05) is None
    os.write(user, b"no\n")
    assert answers.line(5.0) == "no\n"
    os.close(user)
    os.close(ours)


def test_a_terminal_that_is_gone_has_nothing_more_to_say() -> None:
    user, ours = os.openpty()
    os.close(user)
    answers = TerminalPrompts(ours)
    answers.discard()
    assert answers.line(5.0) == ""
    os.close(ours)
