"""Load runs on a scripted server: who asks when, what is refused, what waits, and what ends a run."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from potluck.measure.endpoint import find_endpoint
from potluck.measure.load_run import ChatGenerator, ChatMix, LoadCell, LoadOutcome, LoadRun, LoadWindow, retry_after_s
from potluck.measure.summary import trial_of
from tests.support.bench.scripted_server import Reply, ScriptedServer, words

ONE = ChatMix(lengths=((4, 1.0),), output=2)


def span(*, requests: int | None = None, duration_s: float | None = None, **more: Any) -> LoadWindow:
    given = {"warm_up_s": 0.0, "drain_s": 20.0, "silence_s": 20.0, **more}
    return LoadWindow(duration_s=duration_s, requests=requests, **given)


def run(
    server: ScriptedServer, cell: LoadCell, length: LoadWindow, *, mix: ChatMix = ONE, stop_after_s: float | None = None
) -> LoadOutcome:
    async def all_of_it() -> LoadOutcome:
        stop = asyncio.Event()
        if stop_after_s is not None:
            asyncio.get_running_loop().call_later(stop_after_s, stop.set)
        endpoint = await find_endpoint(server.url, model=None, key="")
        chats = ChatGenerator(mix, lambda tokens: tokens, seed=1, salt=1)
        load = LoadRun(endpoint, chats, cell, length, output=mix.output, turns=mix.turns, seed=1, stop=stop)
        return await load.run()

    return asyncio.run(all_of_it())


def ends(outcome: LoadOutcome, cell: LoadCell) -> list[str]:
    spell = trial_of(outcome, cell)
    assert spell is not None
    return sorted(each.end for each in spell.requests)


def test_clients_ask_again_when_they_have_their_answer() -> None:
    most = 0

    def script(body: dict[str, Any]) -> Reply:
        nonlocal most
        most = max(most, len(server.bodies) - server.answered)
        return Reply(texts=["a", "b"], wait_s=0.02)

    with ScriptedServer(script) as server:
        cell = LoadCell(clients=3)
        outcome = run(server, cell, span(requests=12))
        assert 1 < most <= 3
        assert ends(outcome, cell) == ["done"] * 12
        assert len(server.bodies) == 12
        assert {body["max_tokens"] for body in server.bodies} == {2}
        assert len({body["messages"][0]["content"].split()[0] for body in server.bodies}) == 12


def test_a_duration_ends_asking_but_not_answers() -> None:
    with ScriptedServer(lambda body: Reply(texts=[" a"] * 4, wait_s=0.05)) as server:
        cell = LoadCell(clients=2)
        outcome = run(server, cell, span(duration_s=0.5))
        spell = trial_of(outcome, cell)
        assert spell is not None and spell.window_s == pytest.approx(0.5)
        assert {each.end for each in spell.requests} == {"done"}
        # What came after the window is no throughput, but the last answers' times count.
        came = sum(each.answer.tokens for each in spell.requests)
        assert 0 < spell.tokens < came
        assert spell.answers < len(spell.requests)


def test_the_warm_up_is_not_measured() -> None:
    with ScriptedServer(lambda body: Reply(texts=[" a"] * 2, wait_s=0.02)) as server:
        cell = LoadCell(clients=1)
        outcome = run(server, cell, span(duration_s=0.3, warm_up_s=0.3))
        spell = trial_of(outcome, cell)
        assert spell is not None
        assert 0 < len(spell.requests) < len(server.bodies)
        assert all(request.scheduled_s >= outcome.begin_s for request in outcome.requests if request.is_measured)


def test_a_refused_client_waits_as_long_as_it_is_told() -> None:
    asked_s: list[float] = []

    def script(body: dict[str, Any]) -> Reply:
        asked_s.append(time.perf_counter())
        busy = {1: 429, 2: 503}.get(len(asked_s))
        return Reply(status=busy, message="busy", headers={"Retry-After": "0.3"}) if busy else words(2)

    with ScriptedServer(script) as server:
        cell = LoadCell(clients=1)
        outcome = run(server, cell, span(requests=2))
        assert ends(outcome, cell) == ["done", "done", "refused", "refused"]
        assert [request.exchange.reader.status for request in outcome.requests] == [429, 503, 200, 200]
        assert min(after - before for before, after in itertools.pairwise(asked_s[:3])) >= 0.3
        # It is the same message that is asked again.
        assert server.bodies[0]["messages"] == server.bodies[2]["messages"] != server.bodies[3]["messages"]


def test_an_open_loop_does_not_ask_again() -> None:
    with ScriptedServer(lambda body: Reply(status=429, message="busy", headers={"Retry-After": "9"})) as server:
        cell = LoadCell(rate_per_s=200.0)
        assert ends(run(server, cell, span(requests=8)), cell) == ["refused"] * 8
        assert len(server.bodies) == 8


def test_requests_that_queue_count_their_waiting() -> None:
    # One at a time, 0.1 s each, and all ten are due within some hundredths of a second.
    with ScriptedServer(lambda body: Reply(texts=[" a"] * 2, wait_s=0.05), at_once=1) as server:
        cell = LoadCell(rate_per_s=400.0)
        spell = trial_of(run(server, cell, span(requests=10)), cell)
        assert spell is not None
        latencies = sorted(each.latency_s for each in spell.requests)
        assert len(latencies) == 10
        assert latencies[-1] > 0.7
        closed = trial_of(run(server, LoadCell(clients=1), span(requests=10)), LoadCell(clients=1))
        assert closed is not None
        assert min(each.latency_s for each in closed.requests) < latencies[4]


def test_what_is_unanswered_at_the_end_counts_as_having_waited() -> None:
    with ScriptedServer(lambda body: Reply(texts=[" a"] * 9, hangs_after=0)) as server:
        cell = LoadCell(rate_per_s=50.0)
        outcome = run(server, cell, span(duration_s=0.2, drain_s=0.3))
        spell = trial_of(outcome, cell)
        assert spell is not None and spell.requests
        assert {each.end for each in spell.requests} == {"unfinished"}
        assert min(each.ttft_s for each in spell.requests) > 0.25


def test_a_stop_leaves_what_was_measured() -> None:
    replies = iter([words(2), words(2)])
    with ScriptedServer(lambda body: next(replies, Reply(texts=["a", "b"], hangs_after=1))) as server:
        cell = LoadCell(clients=1)
        outcome = run(server, cell, span(requests=50), stop_after_s=2.0)
        assert outcome.is_interrupted
        assert ends(outcome, cell) == ["done", "done", "unfinished"]


def test_an_answer_that_breaks_off_and_one_that_hangs_are_failures() -> None:
    replies = iter([words(2), Reply(texts=["a", "b"], hangs_after=1, breaks=True), Reply(texts=["a"], hangs_after=0)])
    with ScriptedServer(lambda body: next(replies)) as server:
        cell = LoadCell(clients=1)
        outcome = run(server, cell, span(requests=3, silence_s=1.5))
        spell = trial_of(outcome, cell)
        assert spell is not None
        assert [each.end for each in spell.requests] == ["done", "failed", "failed"]
        assert [each.answer.error for each in spell.requests][1:] == ["the connection broke off", "no news for 1.5 s"]
        assert outcome.failure == ""


def test_nothing_but_failures_end_a_spell() -> None:
    with ScriptedServer(lambda body: Reply(status=500, message="out of memory")) as server:
        outcome = run(server, LoadCell(clients=8), span(duration_s=60.0))
        assert outcome.failure == "500: out of memory"
        assert outcome.cut_s - outcome.begin_s < 30


def test_turns_carry_their_history() -> None:
    with ScriptedServer(lambda body: words(2)) as server:
        mix = ChatMix(lengths=((4, 1.0),), output=2, turns=3)
        outcome = run(server, LoadCell(clients=1), span(requests=4), mix=mix)
        assert [request.turn for request in outcome.requests] == [0, 1, 2, 0]
        first, second, third, other = [body["messages"] for body in server.bodies]
        assert third[:3] == second and second[:1] == first and other[0] != first[0]
        assert [message["role"] for message in third] == ["user", "assistant", "user", "assistant", "user"]
        assert third[1]["content"] == " word word"


def test_retry_after() -> None:
    assert retry_after_s("2", 0.0) == 2.0
    assert retry_after_s("9999", 0.0) == 30.0
    assert retry_after_s("-1", 0.0) == 0.1
    for unknown in (None, "soon", "nan", ""):
        assert retry_after_s(unknown, 0.0) == 1.0
    assert retry_after_s("Thu, 01 Jan 1970 00:00:20 GMT", 15.0) == 5.0
