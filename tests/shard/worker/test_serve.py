"""What a stage's loop puts on the wire: each stage's seconds, and for a decode step no more however long the prompt."""

from __future__ import annotations

import numpy as np
import pytest

from shard.stage import Batch, StageSpec
from shard.worker.local_stage import LocalStage
from shard.worker.serve import StageServer
from tests.support.shard.stage_runner import tiny_spec
from tests.support.shard.tiny import NUM_LAYERS, VOCAB_SIZE
from transport.codec import EdgeLimits, Received, encode
from transport.links.link import MemoryReceiver, MemorySender, memory_link
from transport.messages.ring import (
    DataMessage,
    Entry,
    Failed,
    Fence,
    Hidden,
    Open,
    Sampled,
    Sampling,
    SequenceId,
    Tokens,
    Truncate,
)

FENCE = Fence("ring", 1, "plan")
ONE, TWO = SequenceId(1), SequenceId(2)
HIDDEN_SIZE = 8
CONTEXT_TOKENS = 40_000
LIMITS = EdgeLimits(
    fence=FENCE,
    hidden_size=HIDDEN_SIZE,
    dtype="float32",
    vocab_size=VOCAB_SIZE,
    context_tokens=CONTEXT_TOKENS,
    max_step_tokens=CONTEXT_TOKENS,
)


class CountingBackend:
    """Implements ShardBackend without computing: lengths of KV, and zeros in the right shapes."""

    weights_bytes = 0

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self._lengths: dict[SequenceId, int] = {}
        self.kv = self

    def forward(self, batch: Batch) -> np.ndarray:
        for entry in batch.entries:
            self._lengths[entry.sequence] = entry.start + len(entry.token_ids)
        if self.spec.is_last:
            return np.zeros((sum(entry.num_logits for entry in batch.entries), VOCAB_SIZE), np.float32)
        return np.zeros((sum(len(entry.token_ids) for entry in batch.entries), HIDDEN_SIZE), np.float32)

    def length(self, sequence: SequenceId) -> int:
        return self._lengths.get(sequence, 0)

    def truncate(self, sequence: SequenceId, length: int) -> int:
        self._lengths[sequence] = length
        return length

    def release(self, sequence: SequenceId) -> None:
        self._lengths.pop(sequence, None)

    def fork(self, source: SequenceId, target: SequenceId, length: int) -> bool:
        self._lengths[target] = length
        return True

    def move(self, source: SequenceId, target: SequenceId) -> None:
        self._lengths[target] = self._lengths.pop(source)

    def num_bytes(self) -> int:
        return 0

    def num_tokens(self) -> int:
        return sum(self._lengths.values())

    def num_sequences(self) -> int:
        return len(self._lengths)


class OneStage:
    """One stage's loop, a message at a time."""

    def __init__(self, first: int, last: int, index: int) -> None:
        spec = tiny_spec(first, last, context_tokens=CONTEXT_TOKENS, kv_capacity_tokens=CONTEXT_TOKENS)
        self._before: MemorySender
        self._after: MemoryReceiver
        self._before, receiver = memory_link(LIMITS)
        sender, self._after = memory_link(LIMITS)
        self._server = StageServer(LocalStage(CountingBackend(spec)), spec, receiver, sender, fence=FENCE, index=index)
        self.clock = self._server.counters

    def take(self, message: DataMessage, buffers: tuple[memoryview, ...] = ()) -> Received:
        """What the stage makes of it."""
        self._before.send(message, buffers)
        answers = iter([False, True])
        self._server.run(lambda: next(answers))
        received = self._after.receive(0.0)
        assert received is not None
        return received


@pytest.fixture
def stages() -> list[OneStage]:
    return [OneStage(0, 2, 0), OneStage(2, NUM_LAYERS, 1)]


def run(stages: list[OneStage], message: DataMessage) -> list[DataMessage]:
    """The step as it crosses each edge."""
    crossing = [message]
    buffers: tuple[memoryview, ...] = ()
    for stage in stages:
        received = stage.take(crossing[-1], buffers)
        crossing.append(received.message)
        buffers = received.buffers
    return crossing


def test_results_carry_what_each_stage_computed(stages: list[OneStage]) -> None:
    _, hidden, sampled = run(stages, Tokens(FENCE, 0, (Open(ONE, (1, 2), Sampling()),), (Entry(ONE, 0, (1, 2), 1),)))
    assert isinstance(hidden, Hidden)
    assert isinstance(sampled, Sampled)
    assert sampled.seconds == (stages[0].clock.prefill_s, stages[1].clock.prefill_s)
    assert sampled.seconds[:1] == hidden.seconds
    assert min(sampled.seconds) > 0
    _, _, again = run(stages, Tokens(FENCE, 1, (), (Entry(ONE, 2, (3,), 1),)))
    assert isinstance(again, Sampled)
    assert again.seconds == (stages[0].clock.decode_s, stages[1].clock.decode_s)


def test_a_step_without_entries_carries_them_too(stages: list[OneStage]) -> None:
    *_, sampled = run(stages, Tokens(FENCE, 0, (Open(ONE, (1,), Sampling()),), ()))
    assert isinstance(sampled, Sampled)
    assert len(sampled.seconds) == 2


def test_a_step_that_fails_is_passed_on_as_one(stages: list[OneStage]) -> None:
    *_, failed = run(stages, Tokens(FENCE, 0, (Truncate(ONE, 1),), ()))
    assert isinstance(failed, Failed)
    assert failed.stage == 0


def decode_bytes(stages: list[OneStage], sequence: SequenceId, step: int, prompt_tokens: int) -> list[int]:
    """Header bytes of a decode step on each edge, after a prompt of so many tokens."""
    prompt = tuple(number % VOCAB_SIZE for number in range(prompt_tokens))
    sampling = Sampling(repetition_penalty=1.1, top_logprobs=2, temperature=0.5)
    run(stages, Tokens(FENCE, step, (Open(sequence, prompt, sampling),), (Entry(sequence, 0, prompt, 1),)))
    decode = Tokens(FENCE, step + 1, (), (Entry(sequence, prompt_tokens, (7,), 1),))
    return [len(encode(message)) for message in run(stages, decode)]


def test_decode_messages_are_as_long_after_a_short_prompt_as_after_a_long_one(stages: list[OneStage]) -> None:
    """But for positions, which take up to four bytes more than the smallest ones do."""
    # Positions of two bytes each.
    assert decode_bytes(stages, ONE, 0, 300) == decode_bytes(stages, TWO, 2, 30_000)
    shortest = decode_bytes([OneStage(0, 2, 0), OneStage(2, NUM_LAYERS, 1)], ONE, 0, 1)
    longest = decode_bytes([OneStage(0, 2, 0), OneStage(2, NUM_LAYERS, 1)], ONE, 0, 39_000)
    assert all(0 <= long - short <= 4 for short, long in zip(shortest, longest, strict=True))
