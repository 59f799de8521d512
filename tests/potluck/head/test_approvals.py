from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from devices.pairing.identity import fingerprint
from devices.pairing.pake import Candidate
from potluck.head.approvals import Approvals, StdinPrompts, TerminalPrompts, terminal_prompts
from transport.errors import BadRequest, DeadlineExceeded
from transport.security.curve import new_key_pair


def candidate(name: str = "kitchen-pc") -> Candidate:
    return Candidate(key=new_key_pair().public, name=name, platform="Linux x86-64", address="192.168.1.7")


class Typed:
    """A terminal whose user types when told to."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._there = threading.Condition()

    def type(self, line: str) -> None:
        with self._there:
            self._lines.append(line)
            self._there.notify()

    def discard(self) -> None:
        with self._there:
            self._lines.clear()

    def line(self, timeout_s: float) -> str | None:
        with self._there:
            return self._lines.pop(0) if self._there.wait_for(lambda: self._lines, timeout_s) else None


class Head:
    def __init__(self, terminal: StdinPrompts | None = None, **options: object) -> None:
        self.said: list[str] = []
        self.approvals = Approvals(self.said.append, terminal=lambda: terminal, **options)  # type: ignore[arg-type]
        self.pool = ThreadPoolExecutor(4)

    def ask(self, who: Candidate) -> Future[bool]:
        waiting = self.pool.submit(self.approvals.wait_for_decision, who)
        until(lambda: waiting.done() or who in self.approvals.pending)
        return waiting


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_so()


def test_yes_to_all_lets_in_whoever_knows_the_code() -> None:
    head = Head(allow_all=True)
    assert head.approvals.wait_for_decision(candidate())
    assert "kitchen-pc" in head.said[0]


@pytest.mark.parametrize("allow", [True, False])
def test_another_command_answers_and_the_head_says_which_one(allow: bool) -> None:
    head, who = Head(), candidate()
    waiting = head.ask(who)
    until(lambda: head.said)
    assert fingerprint(who.key) in head.said[0]
    assert "potluck approve kitchen-pc" in head.said[0]
    assert head.approvals.decide("kitchen-pc", allow) == who
    assert waiting.result(60.0) is allow
    assert head.approvals.pending == ()


@pytest.mark.parametrize(
    ("typed", "allow"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("yellow\n", False)]
)
def test_the_user_answers_in_the_terminal(typed: str, allow: bool) -> None:
    terminal = Typed()
    head = Head(terminal)
    terminal.type("y\n")  # Before there is a question.
    waiting = head.ask(candidate())
    until(lambda: head.said)
    assert r"Allow? \[y/N]" in head.said[0]
    assert not waiting.done()
    terminal.type(typed)
    assert waiting.result(60.0) is allow


def test_questions_come_one_after_the_other() -> None:
    terminal = Typed()
    head = Head(terminal)
    first = head.ask(candidate("first"))
    until(lambda: head.said)
    second = head.ask(candidate("second"))
    time.sleep(0.3)
    assert len(head.said) == 1
    terminal.type("n\n")
    assert first.result(60.0) is False
    until(lambda: any("second" in line for line in head.said))
    terminal.type("y\n")
    assert second.result(60.0) is True


def test_a_terminal_that_ends_leaves_the_other_way() -> None:
    terminal = Typed()
    head = Head(terminal)
    waiting = head.ask(candidate())
    until(lambda: head.said)
    terminal.type("")
    until(lambda: any("potluck approve" in line for line in head.said))
    head.approvals.decide("kitchen-pc", True)
    assert waiting.result(60.0) is True


def test_nobody_waits_for_ever() -> None:
    head = Head(wait_s=0.2)
    with pytest.raises(DeadlineExceeded):
        head.approvals.wait_for_decision(candidate())
    assert head.approvals.pending == ()


def test_who_goes_away_is_not_let_in() -> None:
    head, who = Head(), candidate()
    waiting = head.ask(who)
    who.gone.set()
    assert waiting.result(60.0) is False
    with pytest.raises(BadRequest, match="waits"):
        head.approvals.decide("kitchen-pc", True)


def test_two_of_one_name_are_told_apart_by_their_fingerprints() -> None:
    head, one, other = Head(), candidate("mac"), candidate("mac")
    waiting = [head.ask(one), head.ask(other)]
    with pytest.raises(BadRequest, match="2 devices") as raised:
        head.approvals.decide("mac", True)
    assert fingerprint(other.key) in raised.value.hint
    assert head.approvals.decide(fingerprint(other.key)[:9], True) == other
    assert waiting[1].result(60.0) is True
    assert not waiting[0].done()
    head.approvals.decide("mac", False)
    assert waiting[0].result(60.0) is False


def test_an_answer_about_nobody_says_who_waits() -> None:
    head = Head()
    with pytest.raises(BadRequest) as raised:
        head.approvals.decide("mac", True)
    assert "potluck join" in raised.value.hint
    waiting = head.ask(candidate("pc"))
    with pytest.raises(BadRequest) as raised:
        head.approvals.decide("mac", True)
    assert "pc" in raised.value.hint
    head.approvals.decide("pc", False)
    assert not waiting.result(60.0)


@pytest.mark.skipif(os.name != "posix", reason="there are no pseudo-terminals")
def test_lines_typed_in_a_terminal_are_read_within_the_time_given() -> None:
    keyboard, screen = os.openpty()
    answers = TerminalPrompts(screen)
    os.write(keyboard, b"typed before\n")
    time.sleep(0.05)
    answers.discard()
    assert answers.line(0.05) is None
    os.write(keyboard, b"y")
    assert answers.line(0.05) is None
    os.write(keyboard, b"\n")
    assert answers.line(60.0) == "y\n"
    os.close(keyboard)
    assert answers.line(60.0) == ""
    os.close(screen)


def test_without_a_terminal_nobody_is_asked_there() -> None:
    assert terminal_prompts() is None  # pytest has none
