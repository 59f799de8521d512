"""Whatever comes, goes, is cancelled or begins alike: each request gets the tokens that it gets alone.

The engine on real stages of tiny models in fp32, greedy. Sums in fp32 depend on what is computed together: a position
whose two best tokens are closer than 1e-3 may go either way, and from there on a request is not compared.
"""

from __future__ import annotations

import random
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from potluck.engine.request_manager import _FIRST_RESTARTED_ID
from potluck.engine.settings import EngineLimits
from potluck.engine.tokenizer import Prompt
from shard.stage import HiddenOutput, ShardBackend, StageInput, TokenOutput
from shard.worker.local_stage import LocalStage
from tests.support.engine.fakes import attached_engine
from tests.support.needs import NEEDS_MLX
from tests.support.shard.stage_runner import Runner, load_stages
from tests.support.shard.tiny import NUM_LAYERS, VOCAB_SIZE, memory_checkpoint, tiny_model
from transport.codec import Received
from transport.errors import PotluckError
from transport.messages.requests import Aborted, Delta, EngineEvent, EngineReady, Finished, RequestFailed, Submit
from transport.messages.ring import DataMessage, Failed, Fence, Sampled, Sampling, Tokens

_FENCE = Fence("ring", 1, "plan")
_NEAR_TIE = 1e-3
_ANSWER_TOKENS = 24
_CONTEXT = 160
_CAPACITY = 230  # of two long requests, not of all: some wait, some are preempted, prefixes are evicted

pytest.importorskip("mlx_lm", reason=NEEDS_MLX)


class _IdTokenizer:
    """Token ids as numbers with a comma."""

    eos_ids: frozenset[int] = frozenset()

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, most_tokens: int | None = None) -> Prompt:
        raise NotImplementedError

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(range(3, 3 + len(text)))

    def token_bytes(self, token_id: int) -> bytes:
        return b"%d," % token_id

    def is_special(self, token_id: int) -> bool:
        return False


@dataclass
class _Answer:
    ids: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    is_finished: bool = False
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ring:
    """Stages of one model that many engines use one after another: each must leave them empty."""

    backends: tuple[ShardBackend, ...]
    has_window: bool


@cache
def _ring(family: str, runners: tuple[Runner, ...]) -> _Ring:
    folder = Path(tempfile.mkdtemp(prefix="plt-"))
    checkpoint = memory_checkpoint(tiny_model(family, 0), folder)
    backends = load_stages(checkpoint, (NUM_LAYERS // 2,), runners)
    return _Ring(backends=tuple(backends), has_window=family == "gemma3_text")


class _Run:
    """One engine over a ring's stages, in one thread: the receiver plays the schedule, then lets everything end."""

    def __init__(self, ring: _Ring, actions: Sequence[tuple[str, Any]], *, seed: int, keeps: bool = True) -> None:
        self._stages = [LocalStage(backend) for backend in ring.backends]
        self._backends = ring.backends
        self._actions = deque(actions)
        self._random = random.Random(seed)
        self._pending: deque[Tokens] = deque()
        self._is_ready = self._is_cleared = False
        self.answers: dict[str, _Answer] = {}
        self.failures: list[RequestFailed] = []
        self.num_steps_failed = 0
        self.was_preempted = False
        self._engine = attached_engine(
            model="tiny",
            sender=self,
            receiver=self,
            tokenizer=_IdTokenizer(),
            limits=EngineLimits(
                context_tokens=_CONTEXT,
                kv_capacity_tokens=_CAPACITY,
                vocab_size=VOCAB_SIZE,
                num_stages=len(self._stages),
                has_window=ring.has_window,
                prefix_cache=keeps,
                max_chunk_tokens=48,
            ),
            fence=_FENCE,
            emit=self._on_event,
            clock=lambda: 0.0,
        )
        self._engine.run()

    def send(self, message: DataMessage, buffers: Sequence[memoryview] = ()) -> None:
        assert isinstance(message, Tokens)
        self._pending.append(message)
        self.was_preempted |= any(entry.sequence >= _FIRST_RESTARTED_ID for entry in message.entries)

    def receive(self, timeout_s: float) -> Received | None:
        kind, detail = self._actions.popleft() if self._actions and self._is_ready else ("step", None)
        match kind:
            case "submit":
                name = f"r{len(self.answers)}"
                self.answers[name] = _Answer()
                self._engine.submit(
                    Submit(
                        request=name,
                        prompt_ids=detail,
                        max_tokens=_ANSWER_TOKENS,
                        sampling=Sampling(temperature=0.0, top_logprobs=2),
                    )
                )
            case "cancel":
                self._engine.cancel(f"r{detail}")
            case "step" if self._pending:
                return Received(message=self._step(self._pending.popleft()))
            case "step" if not self._actions and self._is_ready and not self._is_cleared:
                self._is_cleared = True
                self._engine.clear_prefix_cache()
            case "step" if not self._actions:
                self._engine.stop()
        return None

    def _step(self, tokens: Tokens) -> Sampled | Failed:
        hidden: np.ndarray | None = None
        output: HiddenOutput | TokenOutput | None = None
        problem: PotluckError | None = None
        for stage in self._stages:
            entries = tokens.entries if problem is None else ()
            try:
                output = stage.forward(StageInput(ops=tokens.ops, entries=entries, hidden=hidden if entries else None))
                hidden = output.hidden if isinstance(output, HiddenOutput) else None
            except PotluckError as error:
                problem = problem or error
        held = [backend.kv.num_tokens() for backend in self._backends]
        assert max(held) <= _CAPACITY
        if problem is not None:
            self.num_steps_failed += 1
            return Failed(_FENCE, tokens.step, tokens.ops, 0, problem.code, problem.message)
        assert isinstance(output, TokenOutput)
        seconds = tuple(self._random.choice((0.001, 0.01, 0.05)) for _ in self._stages)
        return Sampled(_FENCE, tokens.step, output.results, seconds)

    def _on_event(self, event: EngineEvent) -> None:
        match event:
            case EngineReady():
                self._is_ready = True
            case Delta(request=name, logprobs=logprobs):
                answer = self.answers[name]
                for logprob in logprobs:
                    answer.ids.append(int(logprob.token_bytes[:-1]))
                    best, second = logprob.top
                    answer.gaps.append(best[2] - second[2])
            case Finished(request=name, cached_tokens=cached):
                self.answers[name].is_finished = True
                self.answers[name].cached_tokens = cached
            case RequestFailed():
                self.failures.append(event)
            case Aborted():
                pass
            case _:
                pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


_PREFIXES = [tuple(3 + (7 * i + shift) % (VOCAB_SIZE - 3) for i in range(60)) for shift in (0, 11)]


def _prompt(prefix: int, length: int, tail: Sequence[int]) -> tuple[int, ...]:
    return (*_PREFIXES[prefix][:length], *tail)


_PROMPTS = st.builds(
    _prompt,
    st.integers(0, 1),
    st.sampled_from((1, 17, 40, 60)),
    st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=50),
)
_ACTIONS = st.one_of(
    st.tuples(st.just("submit"), _PROMPTS),
    st.tuples(st.just("submit"), _PROMPTS),
    st.tuples(st.just("again"), st.integers(0, 8)),
    st.tuples(st.just("cancel"), st.integers(0, 8)),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("step"), st.none()),
)


_LONG_PROMPTS = st.builds(
    _prompt, st.integers(0, 1), st.just(60), st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=25, max_size=34)
)
_BURSTS = st.lists(st.tuples(st.just("submit"), _LONG_PROMPTS), max_size=4)


def _with_second_turns(actions: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """`again`: a prompt that was sent before, and more: the second turn of a chat."""
    prompts: list[tuple[int, ...]] = []
    for kind, detail in actions:
        if kind == "again":
            if not prompts:
                continue
            kind, detail = "submit", (*prompts[detail % len(prompts)][:110], 5, 9, 14 + detail)
        if kind == "submit":
            prompts.append(detail)
        yield kind, detail


@cache
def _alone(family: str, runners: tuple[Runner, ...], prompt: tuple[int, ...]) -> _Answer:
    run = _Run(_ring(family, runners), [("submit", prompt)], seed=0, keeps=False)
    assert run.failures == [] and run.answers["r0"].is_finished
    return run.answers["r0"]


def _num_compared(got: _Answer, alone: _Answer) -> int:
    for position, token in enumerate(got.ids):
        if alone.gaps[position] < _NEAR_TIE:
            return position
        assert token == alone.ids[position], f"another token at {position}"
    return len(got.ids)


@pytest.mark.parametrize(
    ("family", "runners"),
    [("llama", ("fused", "mlx")), ("llama", ("library", "fused")), ("gemma3_text", ("mlx", "fused"))],
)
@settings(max_examples=40, deadline=None)
@given(st.builds(list.__add__, _BURSTS, st.lists(_ACTIONS, max_size=40)), st.integers(0, 1000))
def test_each_request_gets_the_tokens_that_it_gets_alone(
    family: str, runners: tuple[Runner, ...], actions: list[tuple[str, Any]], seed: int
) -> None:
    played = list(_with_second_turns(actions))
    run = _Run(_ring(family, runners), played, seed=seed)

    assert run.failures == [] and run.num_steps_failed == 0
    event(f"preempts: {run.was_preempted}")
    prompts = [detail for kind, detail in played if kind == "submit"]
    for name, prompt in zip(run.answers, prompts, strict=True):
        answer, alone = run.answers[name], _alone(family, runners, prompt)
        compared = _num_compared(answer, alone)
        event(f"near ties met: {int(compared < len(answer.ids))}")
        event(f"uses a prefix: {answer.cached_tokens > 0}")
        assert not answer.is_finished or len(answer.ids) == _ANSWER_TOKENS
    for backend in _ring(family, runners).backends:
        assert (backend.kv.num_sequences(), backend.kv.num_tokens(), backend.kv.num_bytes()) == (0, 0, 0)
