"""How attempts to connect end, and that nobody waits for what hangs."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from potluck.cli.doctor.check import Check
from potluck.cli.doctor.command import CheckGroup
from potluck.cli.doctor.probe import ConnectOutcome, DeadlineTask, next_step, outcome_of, parse_outcome, try_connect
from transport.errors import ConfigError, DeadlineExceeded


def test_a_port_is_open_or_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert try_connect("127.0.0.1", port).outcome == "open"
        assert try_connect("127.0.0.1", port).meaning == ""
    refused = try_connect("127.0.0.1", port)
    assert refused.outcome == "refused"
    assert "nobody listens" in refused.meaning
    assert refused.host_port == f"127.0.0.1:{port}"


def test_a_port_that_does_not_answer_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = []
        try:
            for _ in range(8):  # Nobody takes them in: soon there is no room.
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(address)
            assert try_connect(*address, 0.3).outcome == "timed out"
        finally:
            for each in waiting:
                each.close()


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.ECONNREFUSED, "refused"),
        (errno.ETIMEDOUT, "timed out"),
        (errno.EHOSTUNREACH, "unreachable"),
        (errno.ENETUNREACH, "unreachable"),
        (errno.EACCES, "failed"),
    ],
)
def test_each_error_has_a_meaning_also_in_another_hosts_words(number: int, outcome: ConnectOutcome) -> None:
    error = OSError(number, os.strerror(number))
    assert outcome_of(error) == outcome
    assert parse_outcome(error.strerror) == outcome
    assert next_step(outcome, whose="alpha", firewall="open the firewall")


def test_no_words_are_no_problem_and_those_of_python_are_known() -> None:
    assert parse_outcome("") == "open"
    assert parse_outcome("timed out") == parse_outcome("no answer in time") == "timed out"


def test_nobody_waits_for_what_hangs_and_what_was_found_out_before_is_kept() -> None:
    never = threading.Event()

    def checks() -> Iterator[Check]:
        yield Check(name="first", state="ok", what="seen")
        never.wait(30.0)
        yield Check(name="second", state="ok", what="never seen")

    part = CheckGroup("the disk", checks())
    found = part.checks(time.monotonic() + 0.2)
    assert [check.name for check in found] == ["first", "the disk"]
    assert found[1].state == "problem"
    assert "no answer in time" in found[1].what
    with pytest.raises(DeadlineExceeded):
        DeadlineTask("x", never.wait).wait(0.01)
    never.set()


def test_errors_of_a_part_are_checks_with_a_hint() -> None:
    def wrong() -> Iterator[Check]:
        raise ConfigError("the file is broken", hint="mend it")
        yield

    def no_disk() -> Iterator[Check]:
        raise OSError(errno.EIO, "Input/output error")
        yield

    deadline = time.monotonic() + 5.0
    assert CheckGroup("pool", wrong()).checks(deadline) == [
        Check(name="pool", state="problem", what="the file is broken", hint="mend it")
    ]
    assert CheckGroup("this host", no_disk()).checks(deadline)[0].what == "Input/output error"
