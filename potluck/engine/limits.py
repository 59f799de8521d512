"""What the engine may promise: limits of requests, of steps, and of waiting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Fixed by the plan and the owner.

    `kv_capacity_tokens` is what all sequences together may hold on each stage. `max_steps_in_flight` is normally the
    number of stages. A prompt goes in chunks of `prefill_chunk_tokens`, or of `busy_chunk_tokens` while others decode,
    so that a long prompt slows their chats less. `max_queued_requests` counts those that wait for KV memory.
    """

    context_tokens: int
    kv_capacity_tokens: int
    vocab_size: int
    max_steps_in_flight: int
    prefill_chunk_tokens: int = 256
    busy_chunk_tokens: int = 64
    max_active_sequences: int = 64
    max_queued_requests: int = 64
    max_choices: int = 16
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_top_logprobs: int = 20

    @property
    def sequence_tokens(self) -> int:
        """The most tokens, prompt and answer, that one sequence can have."""
        return min(self.context_tokens, self.kv_capacity_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDeadlines:
    """How long the ring may make no progress: `factor` times the slowest tokens seen of late, within bounds.

    Before anything has been measured it is `first_s`: weights may still come from the disk.
    """

    first_s: float = 120.0
    min_s: float = 10.0
    max_s: float = 600.0
    factor: float = 6.0
