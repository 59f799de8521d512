"""The step time model predicts how long steps take: what the plan expects of each stage, corrected by reports.

From it follow how many groups fill the ring, and how large a chunk of a prompt may be.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.measurements import StageTimes

_GUESSED_STEP_S = 0.01
_MIN_S = 1e-6
_WEIGHT_OF_FASTER, _WEIGHT_OF_SLOWER = 0.3, 0.1
"""How far an estimate follows a shorter and a longer time: long ones are more often somebody else's work."""
_MAX_SPIKE = 2.0
_FORGET_RATE = 0.01
_MIN_HOPS, _MAX_HOPS = 3, 9
_REFRESH_EVERY = 32
_EQUALLY_GOOD = 1.01
_FILLS_RING = 0.999

Curve = Callable[[int, int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """`count` decode steps in flight of at most `size` sequences. `period_s`: between two tokens of one sequence.
    `busy_s`: what the slowest stage works in that time."""

    count: int
    size: int
    period_s: float
    busy_s: float


class _CorrectedTimes:
    """One stage's times of one kind of step: an expected curve times what real ones were of it, by size."""

    def __init__(self, expected: Curve) -> None:
        self._expected = expected
        self._ratios: dict[int, float] = {}

    def record(self, size: int, before: int, seconds: float) -> None:
        bucket = size.bit_length()
        expected = max(self._expected(size, before), _MIN_S)
        ratio = seconds / expected
        held = self._ratios.get(bucket)
        if held is None:
            self._ratios[bucket] = ratio
        else:
            ratio = min(ratio, _MAX_SPIKE * held)
            self._ratios[bucket] = held + (_WEIGHT_OF_FASTER if ratio < held else _WEIGHT_OF_SLOWER) * (ratio - held)
            # Sizes that do not come would keep what they were in a bad moment, and never be tried again.
            for other, stale in self._ratios.items():
                if other != bucket:
                    self._ratios[other] = stale + _FORGET_RATE * (ratio - stale)

    def seconds(self, size: int, before: int) -> float:
        return self._ratio(size.bit_length()) * max(self._expected(size, before), _MIN_S)

    def _ratio(self, bucket: int) -> float:
        ratios = self._ratios
        found = ratios.get(bucket)
        if found is None:
            found = ratios[min(ratios, key=lambda known: abs(known - bucket))] if ratios else 1.0
        return found


class StepTimeModel:
    """Owned by the engine's thread. Times are seconds; sizes are sequences of a decode step or tokens of a chunk."""

    def __init__(self, num_stages: int, expected: Sequence[StageTimes], hops_s: float) -> None:
        self.num_stages = num_stages
        self.hops_s = hops_s
        self._recent_hops_s: deque[float] = deque(maxlen=_MAX_HOPS)
        times = list(expected) if len(expected) == num_stages else [None] * num_stages
        self._decode = [_CorrectedTimes(_decode_curve(each)) for each in times]
        self._chunk = [_CorrectedTimes(_chunk_curve(each)) for each in times]
        self._micro_batches: dict[int, MicroBatches] = {}
        self.version = 0
        """Goes up when what follows from the times is to be worked out again."""
        self._num_records = 0

    def record(self, sizes: Sequence[tuple[int, int]], seconds: Sequence[float], round_trip_s: float | None) -> None:
        """A step came back: (tokens, positions before) of its entries, what each stage computed, and the round trip if
        nothing else was in the ring."""
        if len(seconds) != self.num_stages or not sizes:
            return
        if round_trip_s is not None:
            self._record_hops(max(0.0, round_trip_s - sum(seconds)))
        if all(tokens == 1 for tokens, _ in sizes):
            for stage, each in zip(self._decode, seconds, strict=True):
                stage.record(len(sizes), 0, each)
        elif len(sizes) == 1:
            for stage, each in zip(self._chunk, seconds, strict=True):
                stage.record(*sizes[0], each)
        self._num_records += 1
        if self._num_records % _REFRESH_EVERY == 0:
            self._micro_batches.clear()
            self.version += 1

    def _record_hops(self, hops_s: float) -> None:
        """The median of the last: first steps are slow, and so is one that somebody else's work held up."""
        self._recent_hops_s.append(hops_s)
        if len(self._recent_hops_s) >= _MIN_HOPS:
            self.hops_s = statistics.median(self._recent_hops_s)

    def decode_s(self, size: int) -> list[float]:
        """Of each stage."""
        return [stage.seconds(size, 0) for stage in self._decode]

    def chunk_s(self, tokens: int, before: int) -> float:
        """Of the slowest stage."""
        return max(stage.seconds(tokens, before) for stage in self._chunk)

    def chunk_trip_s(self, tokens: int, before: int) -> float:
        return sum(stage.seconds(tokens, before) for stage in self._chunk) + self.hops_s

    def prompt_s(self, num_tokens: int) -> float:
        """A prompt alone in the ring, roughly: its chunks follow each other."""
        size = min(128, num_tokens)
        return num_tokens / size * self.chunk_s(size, num_tokens // 2) + self.chunk_trip_s(size, 0)

    def largest_chunk(self, seconds: float, before: int, max_tokens: int) -> int:
        """The most tokens, at most `max_tokens`, that no stage works on longer than that; 0 if not even one."""
        low, high = 0, max_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.chunk_s(middle, before) <= seconds else (low, middle - 1)
        return low

    def micro_batches(self, num_decoding: int, max_count: int) -> MicroBatches:
        """The number of groups that gives most tokens/s: n / max(Σ stages + hops, Σ groups of the slowest stage).

        Of several as good, the fewest that fill the ring, or the most if none does. With steps as fast for many
        sequences as for one that is (Σ stages + Σ hops) / slowest stage, or as many as there are sequences.
        """
        found = self._micro_batches.get(num_decoding)
        if found is None:
            found = self._micro_batches[num_decoding] = self._best_micro_batches(num_decoding, max_count)
        return found

    def _best_micro_batches(self, count: int, max_count: int) -> MicroBatches:
        found: dict[int, MicroBatches] = {}
        for groups in range(1, min(count, max_count) + 1):
            size = -(-count // groups)
            if size not in found:  # else fewer steps do for steps of that size
                found[size] = self._micro_batches_of(count, groups, size)
        shortest_s = min(each.period_s for each in found.values())
        good = [each for each in found.values() if each.period_s <= _EQUALLY_GOOD * shortest_s]
        filling = [each for each in good if each.busy_s >= _FILLS_RING * each.period_s]
        return filling[0] if filling else good[-1]

    def _micro_batches_of(self, count: int, groups: int, size: int) -> MicroBatches:
        per_stage = self.decode_s(size)
        num_full = count - (size - 1) * groups
        smaller = self.decode_s(size - 1) if num_full < groups else per_stage
        busy_s = max(num_full * a + (groups - num_full) * b for a, b in zip(per_stage, smaller, strict=True))
        return MicroBatches(count=groups, size=size, period_s=max(sum(per_stage) + self.hops_s, busy_s), busy_s=busy_s)


def _decode_curve(times: StageTimes | None) -> Curve:
    points = times.decode if times is not None else ()
    if not points:
        return lambda size, before: _GUESSED_STEP_S * (0.5 + 0.5 * size)
    sizes, seconds = [size for size, _ in points], [each for _, each in points]
    return lambda size, before: _interpolate(sizes, seconds, size)


def _chunk_curve(times: StageTimes | None) -> Curve:
    points = times.prefill if times is not None else ()
    if not points:
        return lambda tokens, before: _GUESSED_STEP_S * (1.0 + 0.1 * tokens * (1.0 + before / 4096))
    befores = sorted({before for _, before, _ in points})
    rows = []
    for at in befores:
        of_row = sorted((tokens, seconds) for tokens, before, seconds in points if before == at)
        rows.append(([tokens for tokens, _ in of_row], [seconds for _, seconds in of_row]))

    def seconds_of(tokens: int, before: int) -> float:
        return _interpolate(befores, [_interpolate(sizes, seconds, tokens) for sizes, seconds in rows], before)

    return seconds_of


def _interpolate(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """Linear between points, with the last slope beyond them."""
    if len(xs) == 1:
        return ys[0]
    low = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
    part = (x - xs[low]) / (xs[low + 1] - xs[low])
    return max(0.1 * min(ys), ys[low] + part * (ys[low + 1] - ys[low]))
