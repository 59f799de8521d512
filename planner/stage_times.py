"""What a stage is expected to take for decode steps and for chunks of prompts: the plan's word to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage. `decode`: (sequences in the step, seconds), by number of sequences. `prefill`: (tokens of
    the chunk, positions before it, seconds), for every pair of some numbers of tokens and some of positions."""

    decode: tuple[tuple[int, float], ...]
    prefill: tuple[tuple[int, int, float], ...]
