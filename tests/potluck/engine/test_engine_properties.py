"""Whatever clients and the ring do, each request ends exactly once and nothing is held afterwards.

Everything runs in one thread: the receiver is the script, so that each failure can be replayed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.engine.settings import EngineLimits
from tests.support.engine.fakes import EOS, FENCE, VOCAB, ByteTokenizer, FakeStages, attached_engine
from transport.codec import Received
from transport.errors import RingDown
from transport.messages.requests import (
    Aborted,
    ChoiceFinished,
    Delta,
    EngineDown,
    EngineEvent,
    EngineReady,
    Finished,
    RequestFailed,
    Submit,
)
from transport.messages.ring import DataMessage, Failed, Sampled, Sampling, Tokens

_LIMITS = EngineLimits(
    context_tokens=40,
    kv_capacity_tokens=60,
    vocab_size=VOCAB,
    max_steps_in_flight=3,
    num_stages=2,
    max_chunk_tokens=8,
    max_active_sequences=5,
    max_queued_requests=4,
)

_SUBMITS = st.fixed_dictionaries(
    {
        "prompt": st.tuples(st.sampled_from(["", "a" * 20, "ab" * 12]), st.text(alphabet="abc", max_size=20)).map(
            "".join
        ),
        "max_tokens": st.none() | st.integers(0, 20),
        "stop": st.lists(st.text(alphabet="xyz", min_size=1, max_size=3), max_size=2).map(tuple),
        "num_choices": st.integers(1, 3),
    }
)
_ACTIONS = st.one_of(
    st.tuples(st.just("submit"), _SUBMITS),
    st.tuples(st.just("cancel"), st.integers(0, 10)),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("fail"), st.none()),
    st.tuples(st.just("duplicate"), st.none()),
    st.tuples(st.just("fail early"), st.none()),
    st.tuples(st.just("lose"), st.none() | _SUBMITS),
)


def _sampler(prompt: tuple[int, ...], position: int) -> int:
    """Text of x, y, z with an end now and then, all from the position and the prompt."""
    number = hash((prompt, position)) % 11
    return EOS if number == 0 else ord("xyz"[number % 3])


class _Script:
    """Both ends of the ring. Plays the actions, then lets all steps come back, then stops the engine."""

    def __init__(self, actions: Sequence[tuple[str, Any]], *, starts_warm: bool = True) -> None:
        self.actions = deque(actions)
        self.starts_warm = starts_warm
        self.stages = FakeStages(_sampler, kv_capacity_tokens=_LIMITS.kv_capacity_tokens)
        self.events: list[EngineEvent] = []
        self.submitted: list[str] = []
        self.is_lost = False
        self.may_be_lost = False
        self._is_cleared = False
        self._pending: deque[Tokens] = deque()
        self._last: DataMessage | None = None
        self.engine = attached_engine(
            model="scripted",
            sender=self,
            receiver=self,
            tokenizer=ByteTokenizer(),
            limits=_LIMITS,
            fence=FENCE,
            emit=self.events.append,
            clock=lambda: 0.0,
        )

    def send(self, message: DataMessage, buffers: Sequence[memoryview] = ()) -> None:
        assert isinstance(message, Tokens)
        self._pending.append(message)
        assert len(self._pending) <= _LIMITS.max_steps_in_flight

    def receive(self, timeout_s: float) -> Received | None:
        is_warm = any(isinstance(event, EngineReady | EngineDown) for event in self.events)
        may_act = is_warm or not self.starts_warm
        kind, detail = self.actions.popleft() if self.actions and may_act else ("step", None)
        match kind:
            case "submit":
                self._submit(detail)
            case "cancel":
                self.engine.cancel(f"r{detail}")
            case "lose" if detail is not None:
                self.is_lost = True
                self._submit(detail)
                self.engine.detach(FENCE, RingDown("a worker died"))
                self._submit(detail)
            case "duplicate" if self._last is not None:
                return Received(message=self._last)
            case "step" | "fail" | "fail early" if self._pending:
                self.may_be_lost |= kind != "step" and not is_warm
                self._last = self._take(self._pending.popleft(), kind)
                return Received(message=self._last)
            case "step" if not self.actions and not self._is_cleared:
                self._is_cleared = True
                self.engine.clear_prefix_cache()
            case "step" if not self.actions:
                self.engine.stop()
        return None

    def _submit(self, detail: dict[str, Any]) -> None:
        name = f"r{len(self.submitted)}"
        self.submitted.append(name)
        self.engine.submit(Submit(request=name, sampling=Sampling(top_logprobs=1), **detail))

    def _take(self, tokens: Tokens, kind: str) -> Sampled | Failed:
        if kind == "fail early":
            return Failed(FENCE, tokens.step, tokens.ops, 0, "stage_failed", "failed before its ops")
        return self.stages.take(tokens, fail=kind == "fail")

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


@settings(max_examples=300, deadline=None)
@given(st.lists(_ACTIONS, max_size=60), st.integers(0, 9))
def test_each_request_ends_once_and_nothing_is_held(actions: list[tuple[str, Any]], start: int) -> None:
    script = _Script(actions, starts_warm=start > 0)
    # The engine waits for `stop` once its ring is down, and a script has no second thread to say so.
    _stop_when_down(script)
    script.engine.run()

    ends = Counter(event.request for event in script.events if isinstance(event, Finished | Aborted | RequestFailed))
    assert ends == Counter(script.submitted)
    assert script.stages.problems == []
    pong = script.engine.pong()
    assert (pong.active_requests, pong.queued_requests, pong.sequences) == (0, 0, 0)
    assert (pong.kv_tokens, pong.cached_kv_tokens) == (0, 0)
    is_down = any(isinstance(event, EngineDown) and "stopped" not in event.message for event in script.events)
    # The warm-up is tried twice, as everything is.
    assert is_down == script.is_lost or (is_down and script.may_be_lost)
    assert is_down or script.stages.lengths == {}
    _check_order(script.events)


def _stop_when_down(script: _Script) -> None:
    emit = script.events.append

    def watch(event: EngineEvent) -> None:
        emit(event)
        if isinstance(event, EngineDown):
            script.engine._is_stopping = True

    script.engine._emit = watch


def _check_order(events: list[EngineEvent]) -> None:
    over: set[str] = set()
    for event in events:
        request = getattr(event, "request", None)
        if request is None:
            continue
        assert request not in over, "an event after the terminal one"
        if isinstance(event, Finished | Aborted | RequestFailed):
            over.add(request)


@settings(max_examples=200, deadline=None)
@given(_SUBMITS, st.lists(_SUBMITS, max_size=4))
def test_the_text_does_not_depend_on_the_company(submit: dict[str, Any], others: list[dict[str, Any]]) -> None:
    alone = _run_first([submit])
    assert _run_first([submit, *others]) == alone


def _run_first(submits: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(text, reason, tokens) of the first request's choices."""
    script = _Script([("submit", detail) for detail in submits])
    _stop_when_down(script)
    script.engine.run()
    texts: Counter[int] = Counter()
    answers = {}
    text: dict[int, str] = {}
    for event in script.events:
        match event:
            case Delta(request="r0", choice=choice, text=piece):
                text[choice] = text.get(choice, "") + piece
            case ChoiceFinished(request="r0", choice=choice, reason=reason, completion_tokens=count):
                answers[choice] = (text.get(choice, ""), reason, count)
                texts[choice] += 1
    assert all(count == 1 for count in texts.values())
    return [answers[choice] for choice in sorted(answers)]
