"""A stage's loop takes a step from the neighbour before, runs it, and hands the result to the neighbour after."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shard.stage import Stage, StageInput, StageOutput, StageSpec, TokenOutput
from transport.codec import Received
from transport.errors import PotluckError, StageFailed
from transport.links.link import Receiver, Sender
from transport.messages.control import DecodeBucket
from transport.messages.ring import DataMessage, Entry, Failed, Fence, Hidden, Op, Sampled, Tokens

WIRE_NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
_POLL_S = 1.0


_RECENT_STEPS = 64


@dataclass(slots=True)
class _DecodeTotals:
    """See DecodeBucket."""

    steps: int = 0
    rows: int = 0
    context_tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class StageCounters:
    """Seconds of compute and what they were spent on. Steps with only single-token entries count as decode."""

    decode_steps: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    recent_decode_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _buckets: dict[int, _DecodeTotals] = field(default_factory=dict)

    @property
    def decode_p50_s(self) -> float:
        """Median of the last decode steps; 0 before the first."""
        recent = list(self.recent_decode_s)
        return statistics.median(recent) if recent else 0.0

    def buckets(self) -> tuple[DecodeBucket, ...]:
        """Decode steps by their number of sequences. Another thread may be adding a step: it is in or out, or half."""
        return tuple(
            DecodeBucket(
                largest_rows=largest,
                steps=bucket.steps,
                rows=bucket.rows,
                context_tokens=bucket.context_tokens,
                seconds=bucket.seconds,
            )
            for largest, bucket in sorted(self._buckets.copy().items())
        )

    def add(self, entries: tuple[Entry, ...], seconds: float) -> None:
        num_tokens = sum(len(entry.token_ids) for entry in entries)
        if num_tokens == 0:
            return
        if num_tokens == len(entries):
            self.decode_steps += 1
            self.decode_tokens += num_tokens
            self.decode_s += seconds
            self.recent_decode_s.append(seconds)
            bucket = self._buckets.setdefault(1 << (num_tokens - 1).bit_length(), _DecodeTotals())
            bucket.steps += 1
            bucket.rows += num_tokens
            bucket.context_tokens += sum(entry.start for entry in entries)
            bucket.seconds += seconds
        else:
            self.prefill_tokens += num_tokens
            self.prefill_s += seconds


class StageServer:
    """Runs one stage between two links until `stopped()` or until a neighbour is gone."""

    def __init__(
        self, stage: Stage, spec: StageSpec, receiver: Receiver, sender: Sender, *, fence: Fence, index: int
    ) -> None:
        self._stage = stage
        self._spec = spec
        self._receiver = receiver
        self._sender = sender
        self._fence = fence
        self._index = index
        self._last_step = -1
        self.counters = StageCounters()

    def run(self, stopped: Callable[[], bool]) -> None:
        """Raises NeighbourGone when one is gone, BadMessage when it breaks the protocol."""
        while not stopped():
            received = self._receiver.receive(_POLL_S)
            if received is not None:
                self._handle(received)

    def _handle(self, received: Received) -> None:
        message = received.message
        # No `match` here: its patterns cost 15 µs a message when caches are cold, as they are after a step.
        if isinstance(message, Hidden):
            shape = (message.num_tokens, message.hidden_size)
            hidden = _as_array(received.buffers[0], WIRE_NUMPY[message.dtype], shape)
            work = StageInput(ops=message.ops, entries=message.entries, hidden=hidden)
            self._step(message.step, work, message.seconds)
        elif isinstance(message, Tokens):
            self._step(message.step, StageInput(ops=message.ops, entries=message.entries, hidden=None), ())
        elif isinstance(message, Failed):
            self._last_step = max(self._last_step, message.step)
            # The step has failed already: what is wrong with its ops as well changes nothing for its requests.
            with contextlib.suppress(Exception):
                self._stage.forward(StageInput(ops=message.ops, entries=(), hidden=None))
            self._sender.send(message)

    def _step(self, step: int, work: StageInput, seconds_before: tuple[float, ...]) -> None:
        """`seconds_before`: what the stages before have computed on the step, one number each."""
        if step <= self._last_step:
            return  # a duplicate
        self._last_step = step
        started = time.perf_counter()
        try:
            output = self._stage.forward(work)
        except PotluckError as error:
            self._sender.send(self._failure(step, work.ops, error))
            return
        except Exception as error:  # noqa: BLE001 - whatever it was, the step's requests must hear of it
            wrapped = StageFailed(f"stage {self._index} failed at step {step}: {type(error).__name__}: {error}")
            self._sender.send(self._failure(step, work.ops, wrapped))
            return
        seconds = time.perf_counter() - started
        message, buffers = self._message(step, work, output, (*seconds_before, seconds))
        self._sender.send(message, buffers)
        # The neighbour need not wait for the books.
        self.counters.add(work.entries, seconds)

    def _failure(self, step: int, ops: tuple[Op, ...], error: PotluckError) -> Failed:
        return Failed(self._fence, step, ops, self._index, error.code, error.message, error.hint)

    def _message(
        self, step: int, work: StageInput, output: StageOutput, seconds: tuple[float, ...]
    ) -> tuple[DataMessage, tuple[memoryview, ...]]:
        if isinstance(output, TokenOutput):
            return Sampled(self._fence, step, output.results, seconds), ()
        num_tokens, hidden_size = output.hidden.shape
        dtype = self._spec.next_dtype
        header = Hidden(self._fence, step, work.ops, work.entries, dtype, num_tokens, hidden_size, seconds)
        return header, (_as_bytes(output.hidden),)


def _as_array(buffer: memoryview, dtype: np.dtype[Any], shape: tuple[int, int]) -> np.ndarray:
    return np.ndarray(shape, dtype, buffer) if shape[0] else np.empty(shape, dtype)


def _as_bytes(array: np.ndarray) -> memoryview:
    view = array.data
    if not view.c_contiguous:
        view = np.ascontiguousarray(array).data
    # A view with a zero in its shape can't be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
