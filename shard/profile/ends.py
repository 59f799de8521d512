"""Times of the embedding and the head: what the first and the last stage take besides their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shard.profile.clock import Clock
from shard.profile.report import GridReport
from shard.profile.stage import TimedStage
from transport.messages import SequenceId

ROWS = (1, 2, 4, 8)
_SHARE = 0.12
_CONTEXT = 24


def rest_times(end: TimedStage, single: TimedStage, layers_s: float, clock: Clock) -> GridReport:
    """What a decode step of `end` takes more than one of `single`, by sequences; `layers_s` is how much of that its
    layers are (0 where the two have layers alike). Of the head that is norm, projection and sampling."""
    ends, singles = end.open(ROWS[-1]), single.open(ROWS[-1])
    for stage, sequences in ((end, ends), (single, singles)):
        stage.step(sequences, _CONTEXT, num_logits=0)
    steps = [_decoding(stage, held[:rows]) for rows in ROWS for stage, held in ((end, ends), (single, singles))]
    times = clock.sample(steps, share=_SHARE, most=8)
    seconds: list[float] = []
    for with_rest, without in zip(times[::2], times[1::2], strict=True):
        # More rows never take less: what says so is noise.
        seconds.append(max(with_rest - without - layers_s, seconds[-1] if seconds else 0.0))
    end.release(ends)
    single.release(singles)
    return by_rows(ROWS, seconds)


def by_rows(rows: tuple[int, ...], seconds: Sequence[float]) -> GridReport:
    """A grid without contexts."""
    return GridReport(rows=rows, contexts=(0,), seconds=tuple((value,) for value in seconds))


def _decoding(stage: TimedStage, sequences: Sequence[SequenceId]) -> Callable[[], float]:
    stage.step(sequences)
    return lambda: stage.step(sequences)
