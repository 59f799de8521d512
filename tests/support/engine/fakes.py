"""A scripted ring and a tokenizer are small enough to reason about."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from potluck.engine.input_processor import ChatTokenizer
from potluck.engine.loop import Engine, RingEnds
from potluck.engine.settings import EngineLimits, StepDeadlines
from potluck.engine.tokenizer import Prompt
from transport.errors import BadRequest, NeighbourGone
from transport.links.link import MemoryReceiver, MemorySender, Receiver, Sender, memory_link
from transport.messages.requests import EngineEvent
from transport.messages.ring import (
    Entry,
    EntryResult,
    Failed,
    Fence,
    Fork,
    Open,
    Release,
    Sampled,
    SampledToken,
    SequenceId,
    Tokens,
)

FENCE = Fence("ring", 1, "plan")
EOS = 256
VOCAB = 257

# (sequence's prompt ids, position to sample) → token id
Sampler = Callable[[tuple[int, ...], int], int]


class ByteTokenizer:
    """Token ids are bytes; 256 ends a text."""

    eos_ids = frozenset({EOS})

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, most_tokens: int | None = None) -> Prompt:
        if not messages:
            raise BadRequest("messages is empty", param="messages")
        return Prompt(ids=self.encode_text("".join(str(message["content"]) for message in messages)))

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""

    def is_special(self, token_id: int) -> bool:
        return token_id == EOS


class FakeStages:
    """All stages in one, checking the contract as real ones do. Not a thread: `take` runs one step.

    Holds every sequence's length, so that a test can see that nothing is left.
    """

    def __init__(self, sampler: Sampler, *, kv_capacity_tokens: int = 10**9) -> None:
        self._sampler = sampler
        self._capacity = kv_capacity_tokens
        self.prompts: dict[SequenceId, tuple[int, ...]] = {}
        self.ids: dict[SequenceId, tuple[int, ...]] = {}
        self.lengths: dict[SequenceId, int] = {}
        self.num_opened = 0
        self.num_reused = 0
        self.steps: list[Tokens] = []
        self.problems: list[str] = []

    def take(self, tokens: Tokens, *, fail: bool = False) -> Sampled | Failed:
        """Run a step; `fail` makes it the kind that a stage can't run, after its ops."""
        self.steps.append(tokens)
        wrong: Failed | None = None
        for op in tokens.ops:
            match op:
                case Open(sequence=sequence, prompt_ids=prompt_ids):
                    self._expect(sequence not in self.prompts, f"{sequence} opened twice")
                    self.prompts[sequence] = prompt_ids
                    self.lengths[sequence] = 0
                    self.ids[sequence] = ()
                    self.num_opened += 1
                case Fork(sequence=sequence, source=source, length=length, moves=moves):
                    if not 0 < length <= self.lengths.get(source, 0):
                        wrong = Failed(FENCE, tokens.step, tokens.ops, 0, "stage_failed", "the source is too short")
                        continue
                    self._expect(self.lengths[sequence] == 0, f"{sequence} holds something already")
                    self.ids[sequence] = self.ids[source][:length]
                    self.lengths[sequence] = length
                    self.num_reused += length
                    if moves:
                        self._forget(source)
                case Release(sequence=sequence):
                    self._forget(sequence)
        if fail:
            return Failed(FENCE, tokens.step, tokens.ops, 1, "stage_failed", "scripted failure")
        if wrong is not None:
            return wrong
        results = []
        for entry in tokens.entries:
            if self.lengths.get(entry.sequence) != entry.start:
                return Failed(FENCE, tokens.step, tokens.ops, 0, "stage_failed", "start beyond the length")
            results.extend(self._run(entry))
        self._expect(sum(self.lengths.values()) <= self._capacity, "more KV than there is")
        return Sampled(FENCE, tokens.step, tuple(results))

    def _run(self, entry: Entry) -> list[EntryResult]:
        last = entry.start + len(entry.token_ids)
        held = self.ids[entry.sequence] + entry.token_ids
        self.ids[entry.sequence] = held
        self.lengths[entry.sequence] = last
        prompt = self.prompts[entry.sequence]
        self._expect(held[: len(prompt)] == prompt[:last], "not the prompt's tokens")
        for position in range(max(len(prompt), entry.start), last):
            self._expect(held[position] == self._sampler(prompt, position), "not the tokens that were sampled")
        if not entry.num_logits:
            return []
        self._expect(last >= len(prompt), "a middle chunk wants a token")
        return [EntryResult(entry.sequence, last, (SampledToken(self._sampler(prompt, last), -0.5, ((65, -0.5),)),))]

    def _forget(self, sequence: SequenceId) -> None:
        for held in (self.prompts, self.ids, self.lengths):
            held.pop(sequence, None)

    def _expect(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)


class FakeRing:
    """`FakeStages` in a thread between two memory links."""

    def __init__(self, sampler: Sampler, *, fails: Callable[[Tokens], bool] = lambda tokens: False) -> None:
        self.stages = FakeStages(sampler)
        self._fails = fails
        self.sender, self._inbox = memory_link()
        self._outbox, self.receiver = memory_link()
        self.go = threading.Event()
        self.go.set()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                received = self._inbox.receive(0.05)
            except NeighbourGone:  # The engine has left.
                return
            if received is not None and isinstance(received.message, Tokens):
                self.go.wait()
                with contextlib.suppress(NeighbourGone):  # The engine has left.
                    self._outbox.send(self.stages.take(received.message, fail=self._fails(received.message)))

    def close(self) -> None:
        self._is_stopping = True
        self.go.set()
        self._thread.join()


def links() -> tuple[MemorySender, MemoryReceiver, MemorySender, MemoryReceiver]:
    """engine's sender, ring's inbox, ring's outbox, engine's receiver."""
    sender, inbox = memory_link()
    outbox, receiver = memory_link()
    return sender, inbox, outbox, receiver


def script(text: str) -> Sampler:
    """Answers `text`, then the end."""
    ids = (*text.encode(), EOS)
    return lambda prompt, position: ids[min(position - len(prompt), len(ids) - 1)]


def attached_engine(
    *,
    model: str,
    sender: Sender,
    receiver: Receiver,
    tokenizer: ChatTokenizer,
    limits: EngineLimits,
    fence: Fence,
    emit: Callable[[EngineEvent], None],
    clock: Callable[[], float],
    deadlines: StepDeadlines | None = None,
) -> Engine:
    """An engine with a ring between these ends, which `run` warms up."""
    engine = Engine(model=model, tokenizer=tokenizer, emit=emit, clock=clock, deadlines=deadlines)
    engine.attach_ends(fence, RingEnds(limits=limits, receiver=receiver, connect=lambda is_cancelled: sender))
    engine.warm_up(fence)
    return engine
