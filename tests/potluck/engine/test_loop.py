"""The engine in its thread, against scripted stages in another."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from potluck.engine.settings import EngineLimits, StepDeadlines
from tests.support.engine.fakes import FENCE, VOCAB, ByteTokenizer, FakeRing, Sampler, attached_engine, script
from transport.errors import RingDown
from transport.messages.requests import (
    Aborted,
    Accepted,
    ChoiceFinished,
    Delta,
    EngineDown,
    EngineEvent,
    EngineReady,
    Finished,
    RequestFailed,
    Submit,
)
from transport.messages.ring import Sampling, Tokens

LIMITS = EngineLimits(context_tokens=100, kv_capacity_tokens=200, vocab_size=VOCAB, num_stages=2, prefix_cache=False)
_GREEDY = Sampling(temperature=0.0)


def forever(prompt: tuple[int, ...], position: int) -> int:
    return ord("x")


class Bench:
    """An engine, its ring, and what it said."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        limits: EngineLimits = LIMITS,
        deadlines: StepDeadlines | None = None,
        fails: Callable[[Tokens], bool] = lambda tokens: False,
    ) -> None:
        self.events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self.ring = FakeRing(sampler, fails=fails)
        self.engine = attached_engine(
            model="scripted",
            sender=self.ring.sender,
            receiver=self.ring.receiver,
            tokenizer=ByteTokenizer(),
            limits=limits,
            fence=FENCE,
            emit=self.events.put,
            clock=time.monotonic,
            deadlines=deadlines,
        )
        self.thread = threading.Thread(target=self.engine.run, daemon=True)

    def start(self) -> Bench:
        self.thread.start()
        return self

    def submit(self, name: str, **fields: Any) -> None:
        fields.setdefault("prompt", "hello")
        fields.setdefault("sampling", _GREEDY)
        self.engine.submit(Submit(request=name, **fields))

    def until(self, kind: type[Any], *, timeout_s: float = 60.0) -> list[EngineEvent]:
        """Events up to the first of a kind."""
        seen: list[EngineEvent] = []
        while not seen or not isinstance(seen[-1], kind):
            seen.append(self.events.get(timeout=timeout_s))
        return seen

    def close(self) -> None:
        self.engine.stop()
        self.ring.close()
        self.thread.join(60.0)
        assert not self.thread.is_alive()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    opened: list[Bench] = []

    def open_bench(sampler: Sampler, **options: Any) -> Bench:
        opened.append(Bench(sampler, **options).start())
        return opened[-1]

    yield open_bench
    for each in opened:
        each.close()


def text_of(events: list[EngineEvent], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_says_ready_after_a_warm_up_that_leaves_nothing(bench: Callable[..., Bench]) -> None:
    b = bench(script("hi"))
    assert b.until(EngineReady) == [EngineReady(model="scripted", context_tokens=100, fence=FENCE)]
    assert b.ring.stages.num_opened == 1
    eventually(lambda: b.ring.stages.lengths == {})


def test_an_answer_is_streamed_and_counted(bench: Callable[..., Bench]) -> None:
    b = bench(script("héllo 😀!"))
    b.until(EngineReady)
    b.submit("r")
    events = b.until(Finished)
    assert events[0] == Accepted("r", 5)
    assert text_of(events) == "héllo 😀!"
    assert all("\ufffd" not in event.text for event in events if isinstance(event, Delta))
    assert events[-2] == ChoiceFinished("r", 0, "stop", len("héllo 😀!".encode()) + 1)
    finished = events[-1]
    assert isinstance(finished, Finished) and finished.ttft_s > 0 and finished.decode_s > 0


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"max_tokens": 3}, "abc", "length"),
        ({"stop": ("cde",)}, "ab", "stop"),
        ({"stop": ("fgh!",)}, "abcdefgh", "stop"),
        ({"max_tokens": 4, "stop": ("cdef",)}, "abcd", "length"),
    ],
)
def test_what_ends_an_answer(bench: Callable[..., Bench], fields: dict[str, Any], text: str, reason: str) -> None:
    b = bench(script("abcdefgh"))
    b.until(EngineReady)
    b.submit("r", **fields)
    events = b.until(Finished)
    assert text_of(events) == text
    assert [event.reason for event in events if isinstance(event, ChoiceFinished)] == [reason]


def test_choices_and_requests_share_the_ring(bench: Callable[..., Bench]) -> None:
    b = bench(script("hello"))
    b.until(EngineReady)
    b.submit("r", num_choices=3)
    events = b.until(Finished)
    assert [text_of(events, choice) for choice in range(3)] == ["hello"] * 3
    assert isinstance(events[-1], Finished) and events[-1].completion_tokens == 18


def test_cancel_frees_the_stages_though_nothing_else_runs(bench: Callable[..., Bench]) -> None:
    b = bench(forever, limits=replace(LIMITS, context_tokens=10**6, kv_capacity_tokens=10**6))
    b.until(EngineReady)
    b.submit("r")
    b.until(Delta)
    b.engine.cancel("r")
    assert b.until(Aborted)[-1] == Aborted("r")
    eventually(lambda: b.ring.stages.lengths == {})
    pong = b.engine.pong()
    assert (pong.active_requests, pong.sequences) == (0, 0)


def test_logprobs_belong_to_the_text_that_goes_out(bench: Callable[..., Bench]) -> None:
    b = bench(script("abcdef"))
    b.until(EngineReady)
    b.submit("r", stop=("de",), sampling=Sampling(temperature=0.0, top_logprobs=1))
    events = b.until(Finished)
    logprobs = [item for event in events if isinstance(event, Delta) for item in event.logprobs]
    assert [item.token for item in logprobs] == ["a", "b", "c"]
    assert logprobs[0].top == (("A", b"A", -0.5),)


def test_a_prompt_beyond_the_context_is_refused_with_numbers(bench: Callable[..., Bench]) -> None:
    b = bench(script("hi"))
    b.until(EngineReady)
    for fields, words in (
        ({"prompt": "x" * 100}, ["100", "no room"]),
        ({"prompt": "x" * 60, "max_tokens": 41}, ["100", "60", "41"]),
        ({"prompt": ""}, ["no tokens"]),
        ({"prompt_ids": (999,), "prompt": None}, ["257"]),
        ({"sampling": Sampling(logit_bias={999: 1.0})}, ["999", "257"]),
        ({"num_choices": 17}, ["17"]),
    ):
        b.submit("r", **fields)
        failed = b.until(RequestFailed)[-1]
        assert isinstance(failed, RequestFailed) and failed.code == "invalid_request" and failed.param
        assert all(word in failed.message for word in words), failed.message


def test_a_full_queue_is_busy_and_a_freed_one_goes_on(bench: Callable[..., Bench]) -> None:
    b = bench(forever, limits=replace(LIMITS, max_queued_requests=1, max_active_sequences=2))
    b.until(EngineReady)
    b.ring.go.clear()
    for name in ("a", "b", "c", "d"):
        b.submit(name)
    failed = b.until(RequestFailed)[-1]
    assert isinstance(failed, RequestFailed) and (failed.request, failed.code) == ("d", "busy")
    assert b.engine.pong().queued_requests == 1
    b.ring.go.set()
    ends = [b.until(Finished)[-1] for _ in range(3)]
    assert {event.request for event in ends if isinstance(event, Finished)} == {"a", "b", "c"}


def test_a_failed_step_ends_its_own_requests_only(bench: Callable[..., Bench]) -> None:
    b = bench(forever, fails=lambda tokens: any(e.start == 0 and len(e.token_ids) == 7 for e in tokens.entries))
    b.until(EngineReady)
    b.submit("good", prompt="hello", max_tokens=50)
    b.until(Delta)
    b.submit("bad", prompt="badness", max_tokens=50)
    events = b.until(Finished)
    failed = [event for event in events if isinstance(event, RequestFailed)]
    assert [(event.request, event.code) for event in failed] == [("bad", "stage_failed")]
    eventually(lambda: b.ring.stages.lengths == {})


def test_a_ring_without_progress_is_down_within_its_deadline(bench: Callable[..., Bench]) -> None:
    b = bench(forever, deadlines=StepDeadlines(first_s=5.0, min_s=0.2, max_s=0.2))
    b.until(EngineReady)
    b.ring.go.clear()
    started = time.monotonic()
    b.submit("r")
    failed = b.until(RequestFailed)[-1]
    assert isinstance(failed, RequestFailed) and failed.code == "ring_down" and "progress" in failed.message
    assert time.monotonic() - started < 4.5
    assert isinstance(b.until(EngineDown)[-1], EngineDown)
    b.submit("late")
    assert b.events.get(timeout=60.0).request == "late"  # type: ignore[union-attr]


def test_a_ring_that_never_warms_up_is_down(bench: Callable[..., Bench]) -> None:
    b = bench(forever, fails=lambda tokens: True)
    down = b.until(EngineDown)[-1]
    assert isinstance(down, EngineDown) and down.code == "ring_down" and "scripted failure" in down.message


def test_a_worker_that_dies_fails_everyone_at_once(bench: Callable[..., Bench]) -> None:
    b = bench(forever)
    b.until(EngineReady)
    b.ring.go.clear()
    for name in ("a", "b", "c"):
        b.submit(name)
    b.engine.detach(FENCE, RingDown("cuda:0 died", hint="look at its log"))
    failed = [b.until(RequestFailed)[-1] for _ in range(3)]
    assert {(event.code, event.message) for event in failed if isinstance(event, RequestFailed)} == {
        ("ring_down", "cuda:0 died")
    }


def test_stop_ends_what_runs(bench: Callable[..., Bench]) -> None:
    b = bench(forever)
    b.until(EngineReady)
    b.ring.go.clear()
    b.submit("r")
    b.engine.stop()
    assert isinstance(b.until(RequestFailed)[-1], RequestFailed)
    b.thread.join(2.0)
    assert not b.thread.is_alive()


def test_an_answer_to_another_question_takes_the_ring_down(bench: Callable[..., Bench]) -> None:
    b = bench(lambda prompt, position: ord("x"))
    b.until(EngineReady)
    original = b.ring.stages.take

    def wrong(tokens: Tokens, *, fail: bool = False) -> Any:
        answer = original(tokens, fail=fail)
        return type(answer)(answer.fence, answer.step, ())

    b.ring.stages.take = wrong  # type: ignore[method-assign]
    b.submit("r")
    failed = b.until(RequestFailed)[-1]
    assert isinstance(failed, RequestFailed) and failed.code == "ring_down"
