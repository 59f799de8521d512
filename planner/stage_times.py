"""What a stage is expected to take for decode steps and for chunks of prompts: the plan's word to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost import CostModel
from planner.evaluate import Assignment, factors

_DECODE_SEQUENCES = (1, 2, 4, 8, 16, 32)
_CHUNK_TOKENS = (8, 16, 32, 64, 128, 256, 512)
_CONTEXT_QUARTERS = (0, 1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage. `decode`: (sequences in the step, seconds), by number of sequences. `prefill`: (tokens of
    the chunk, positions before it, seconds), for every pair of some numbers of tokens and some of positions."""

    decode: tuple[tuple[int, float], ...]
    prefill: tuple[tuple[int, int, float], ...]


def stage_times(costs: CostModel, assignment: Assignment) -> tuple[StageTimes, ...]:
    """Each stage's, while the others of the ring work too. Decode steps read the KV of the workload's usual context;
    chunks ask for no logits."""
    context = costs.workload.context_tokens
    befores = sorted({context * quarters // 4 for quarters in _CONTEXT_QUARTERS})
    slow = factors(costs, assignment, busy=True)

    def of(device: int, first: int, last: int, factor: float) -> StageTimes:
        return StageTimes(
            decode=tuple(
                (group, factor * costs.decode(device, group).span_s(first, last)) for group in _DECODE_SEQUENCES
            ),
            prefill=tuple(
                (tokens, before, factor * costs.chunk(device, tokens, before, is_last=False).span_s(first, last))
                for tokens in _CHUNK_TOKENS
                for before in befores
            ),
        )

    return tuple(
        of(placed.device, placed.first, placed.last, factor) for placed, factor in zip(assignment, slow, strict=True)
    )
