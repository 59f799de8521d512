"""Several hosts of one pool, here on loopback addresses: they pair, share the model that lies on one of them, come back
by themselves, and are put out."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.e2e.lan_hosts import (
    LOADED_S,
    answer,
    hosts_of,
    is_down,
    join,
    join_arguments,
    members,
    new_code,
    new_home,
    new_invite,
    stages,
    up,
)
from tests.support.e2e.potluck_process import ASK_S, GONE_S, READY_S, Home, wait_until

HEAD, BETA, GAMMA = "127.0.0.1", "127.0.0.2", "127.0.0.3"


class Hosts(Protocol):
    def __call__(self, *, has_models: bool = False) -> Home: ...


@pytest.fixture
def hosts(data_home: Path) -> Iterator[Hosts]:
    """Makes hosts of one test; whatever they leave running is ended."""
    made: list[Home] = []

    def host(*, has_models: bool = False) -> Home:
        made.append(new_home(data_home / "models" if has_models else None))
        return made[-1]

    yield host
    for home in made:
        for process in home.processes():
            process.kill()
        shutil.rmtree(home.data.parent, ignore_errors=True)


def test_a_host_pairs_by_code_and_comes_back_by_itself_also_to_a_head_that_was_away(hosts: Hosts) -> None:
    head_home, beta_home = hosts(has_models=True), hosts()
    head = up(head_home, "alpha", HEAD, "--yes")
    door = head.facts()["lan"]
    alone = answer(head)

    def refused(guess: str) -> str:
        done = beta_home.run(*join_arguments("beta", BETA, "--head", door, "--code", guess), timeout_s=ASK_S)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    code = new_code(head_home)
    wrong = code[:-1] + ("0" if code[-1] != "0" else "1")
    assert "guesses left: 2" in refused(wrong)
    assert "guesses left: 1" in refused(wrong)
    assert "locked" in refused(wrong)
    assert "locked" in refused(code)
    assert members(head_home) == {}

    code = new_code(head_home)
    beta = join(beta_home, "beta", BETA, "--head", door, "--code", code)
    wait_until(lambda: len(stages(head)) == 2, LOADED_S, head.said)
    assert stages(head) == [("alpha", "cpu"), ("beta", "beta/cpu")]
    assert answer(head) == alone
    assert members(head_home)["beta"]["connected"] is True
    assert "used already" in refused(code)

    assert head_home.run("rename", "beta", "kitchen").returncode == 0
    beta.stop()
    wait_until(lambda: is_down(head), GONE_S, head.said)
    # Paired once: neither the code nor the door again.
    beta = join(beta_home, "beta", BETA)
    wait_until(lambda: stages(head) == [("alpha", "cpu"), ("kitchen", "kitchen/cpu")], LOADED_S, head.said)

    head.stop()
    head = up(head_home, "alpha", HEAD, port=int(door.rpartition(":")[2]))
    head.facts()
    wait_until(lambda: len(stages(head)) == 2, LOADED_S, lambda: head.said() + beta.said())
    assert answer(head) == alone
    assert list(members(head_home)) == ["kitchen"]
    assert beta.process.poll() is None

    os.kill(beta.process.pid, signal.SIGKILL)  # Its workers end with it.
    beta.process.wait()
    wait_until(lambda: is_down(head), GONE_S, head.said)
    head.stop()
    for home in (head_home, beta_home):
        assert home.leftovers() == []


def test_hosts_pair_by_invite_when_they_are_approved_and_one_that_is_revoked_is_out_at_once(hosts: Hosts) -> None:
    head_home, beta_home, other_home = hosts(has_models=True), hosts(), hosts()
    head = up(head_home, "alpha", HEAD)
    door = head.facts()["lan"]
    assert "potluck://" not in head.said()  # Into a file.
    invite = new_invite(head_home)
    beta = join(beta_home, "beta", BETA, invite)
    wait_until(lambda: "potluck approve beta" in head.said(), READY_S, beta.said)
    assert members(head_home) == {}
    assert head_home.run("approve", "beta").returncode == 0
    wait_until(lambda: len(stages(head)) == 2, LOADED_S, head.said)

    # The invite was used; and who is called like another gets another name.
    again = other_home.run(*join_arguments("beta", GAMMA, invite))
    assert again.returncode == 1
    assert "used already" in again.stderr and "Traceback" not in again.stderr
    second = join(other_home, "beta", GAMMA, "--head", door, "--code", new_code(head_home))
    wait_until(lambda: head_home.run("approve", "beta").returncode == 0, READY_S, head.said)
    wait_until(lambda: set(hosts_of(head)) == {"alpha", "beta", "beta-2"}, LOADED_S, head.said)

    text = answer(head)
    assert head_home.run("revoke", "beta", "--yes").returncode == 0
    wait_until(lambda: is_down(head), GONE_S, head.said)
    wait_until(lambda: hosts_of(head) == ["alpha", "beta-2"], LOADED_S, head.said)
    assert answer(head) == text
    assert beta.process.wait(GONE_S) == 1
    assert "revoked" in beta.said() and "Traceback" not in beta.said()
    # Its key opens nothing now: it is told so, and what to do, and does not wait.
    back = beta_home.run(*join_arguments("beta", BETA), timeout_s=ASK_S)
    assert back.returncode == 1
    assert "alpha has revoked this host" in back.stderr and "potluck join CODE" in back.stderr
    assert "beta" not in hosts_of(head)
    for running in (second, head):
        running.stop()
    for home in (head_home, beta_home, other_home):
        assert home.leftovers() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "smollm2", "--port", "0", "--lan-host", "0.0.0.0"], ["0.0.0.0", "hint"]),
        (["up", "smollm2", "--port", "0", "--lan-host", "203.0.113.7"], ["203.0.113.7", "hint"]),
        (["up", "smollm2", "--port", "0", "--lan-host", "kitchen"], ["kitchen", "IPv4"]),
        (["up", "smollm2", "--port", "0", "--no-lan", "--host-name", "a/b"], ["a/b", "hint"]),
        (["up", "smollm2", "--port", "0", "--lan-host", "127.0.0.1", "--lan-port", "70000"], ["70000"]),
        (["join", "--head", "127.0.0.1:1"], ["127.0.0.1:1", "hint"]),
        (["join", "--head", "127.0.0.1:0"], ["127.0.0.1:0", "HOST:PORT"]),
        (["join", "--head", "no-such-host.invalid:5"], ["no-such-host.invalid", "hint"]),
        (["join", "--head", "127.0.0.1:1", "--code", "hello"], ["hello", "code"]),
        (["join", "hello"], ["hello", "hint"]),
        (["join", "potluck://127.0.0.1:1?key=short&token=1&pool=2"], ["invite", "hint"]),
        (["join", "potluck://127.0.0.1:1", "--head", "127.0.0.1:1"], ["--head", "hint"]),
        (["join", "--no-discovery"], ["--head", "hint"]),
    ],
)
def test_bad_input_ends_with_the_next_step(
    home: Home,
    arguments: list[str],
    words: list[str],
) -> None:
    done = home.run_here(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
