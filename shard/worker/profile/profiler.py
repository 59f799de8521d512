"""The profiler loads a few real stages, times them, and reports a model's layers, embedding and lm_head."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shard.formats.checkpoint import Checkpoint, supported_form
from shard.worker.profile.report import ProfileSettings
from shard.worker.profile.timed_stage import (
    LayerSpan,
    MeasuredSpans,
    SampleTimer,
    TimedStage,
    choose_spans,
    layer_kinds,
    shortest_end_span,
)
from transport.messages.measure import Grid, LayerTimes, ProfileReport
from transport.messages.ring import SequenceId
from transport.process.cpu_use import CpuUse

END_ROWS = (1, 2, 4, 8)
_END_SHARE = 0.12
_END_CONTEXT = 24


def embedding_and_lm_head_times(end: TimedStage, single: TimedStage, layers_s: float, clock: SampleTimer) -> Grid:
    """What a decode step of `end` takes more than one of `single`, by sequences; `layers_s` is how much of that its
    layers are (0 where the two have layers alike). Of the head that is norm, projection and sampling."""
    ends, singles = end.open(END_ROWS[-1]), single.open(END_ROWS[-1])
    for stage, sequences in ((end, ends), (single, singles)):
        stage.step(sequences, _END_CONTEXT, num_logits=0)
    steps = [
        _decode_step_of(stage, held[:rows]) for rows in END_ROWS for stage, held in ((end, ends), (single, singles))
    ]
    times = clock.sample(steps, share=_END_SHARE, max_samples=8)
    seconds: list[float] = []
    for with_rest, without in zip(times[::2], times[1::2], strict=True):
        # More rows never take less: what says so is noise.
        seconds.append(max(with_rest - without - layers_s, seconds[-1] if seconds else 0.0))
    end.release(ends)
    single.release(singles)
    return grid_without_context(END_ROWS, seconds)


def grid_without_context(rows: tuple[int, ...], seconds: Sequence[float]) -> Grid:
    """A grid without contexts."""
    return Grid(rows=rows, contexts=(0,), seconds=tuple((value,) for value in seconds))


def _decode_step_of(stage: TimedStage, sequences: Sequence[SequenceId]) -> Callable[[], float]:
    stage.step(sequences)
    return lambda: stage.step(sequences)


DECODE_ROWS = (1, 2, 4, 8)
CHUNKS = (16, 64, 256)
SHORT_CONTEXT = 32
LONG_CONTEXT = 2048
PREFILL_CONTEXT = 1024

_DECODE_SHARE = 0.35
_PREFILL_SHARE = 0.15
_CONTEXT_SHARE = 0.25
_TOO_LONG_SHARE = 0.04
"""A single step that takes more of the budget than this is not run: the last slope goes on."""

_FAST_SHARE = 0.005

_MAX_CHUNK_SAMPLES = 5
_MAX_STEP_SAMPLES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledStages:
    """The stages to measure with. `kinds` are those of the run's layers."""

    run: TimedStage
    kinds: tuple[int, ...]
    singles: tuple[TimedStage, ...]


@dataclass(slots=True)
class LayerProbe:
    """Measures in an order where each result says what can be afforded next; `tell` names what is being measured."""

    loaded: ProfiledStages
    timer: SampleTimer
    on_progress: Callable[[str], None]
    step_s: float = 0.0
    run_s: float = 0.0
    short: list[dict[int, float]] = field(default_factory=list)
    chunks: list[dict[int, float]] = field(default_factory=list)

    def measure(self) -> tuple[LayerTimes, ...]:
        """One report a kind; afterwards `step_s` and `run_s` (a step of the run, one sequence) are known."""
        num_kinds = len(self.loaded.singles)
        self.short = [{} for _ in range(num_kinds)]
        self.chunks = [{} for _ in range(num_kinds)]
        self._decode()
        self._prefill()
        return tuple(self._with_context(kind) for kind in range(num_kinds))

    def layer_s(self, kind: int, rows: int = 1) -> float:
        """A layer's time in a decode step of short context."""
        return self.short[kind][rows]

    def _decode(self) -> None:
        stages = (self.loaded.run, *self.loaded.singles)
        held = [stage.open(DECODE_ROWS[-1]) for stage in stages]
        points: list[tuple[int, list[Callable[[], float]]]] = []
        for rows in DECODE_ROWS:
            # The single layers tell the step's own cost, once, and how the run's time falls on its kinds.
            count = len(stages) if rows == 1 or len(stages) > 2 else 1
            self.on_progress(f"decode of {rows}")
            steps = [_decode_step(stages[i], held[i][:rows]) for i in range(count)]
            points.append((rows, steps))
            # The slowest device doubles its time with the rows.
            if 2 * steps[0]() > _TOO_LONG_SHARE * self.timer.budget_s:
                break
        times = self._sample_together(points, share=_DECODE_SHARE, most=_MAX_STEP_SAMPLES)
        run_s, *single_s = times[1]
        self.run_s, self.step_s = run_s, self._step_s(run_s, single_s)
        for rows, (run_s, *single_s) in times.items():
            for kind, seconds in enumerate(self._split_by_kind(run_s, single_s)):
                self.short[kind][rows] = seconds
        for stage, sequences in zip(stages, held, strict=True):
            stage.release(sequences)

    def _prefill(self) -> None:
        """First chunks of a prompt: through the run where that is affordable, else through the single layers."""
        run, singles = self.loaded.run, self.loaded.singles
        longest_s = _TOO_LONG_SHARE * self.timer.budget_s
        points: list[tuple[int, list[Callable[[], float]]]] = []
        through_run = set()
        run_s, single_s = 2 * self.run_s, 0.0
        context = run.spec.context_tokens
        for rows in [rows for rows in CHUNKS if 4 * rows <= context] or [max(1, context // 4)]:
            growth = rows / points[-1][0] if points else 1
            if growth * single_s > longest_s:
                break
            self.on_progress(f"chunks of {rows}")
            single_s = max(stage.time_first_chunk(rows) for stage in singles)
            stages = list(singles)
            # A layer alone would pay for all that a step of so many tokens costs besides.
            if growth * run_s < 2 * longest_s:
                through_run.add(rows)
                stages = [run, *singles] if len(singles) > 1 else [run]
                run_s = run.time_first_chunk(rows)
            else:
                run_s = 2 * longest_s
            points.append((rows, [_first_chunk_step(stage, rows) for stage in stages]))
        for rows, times in self._sample_together(points, share=_PREFILL_SHARE, most=_MAX_CHUNK_SAMPLES).items():
            if rows in through_run:
                found = self._split_by_kind(times[0], times[1:])
            else:
                found = [self._layer_of_single(kind, seconds) for kind, seconds in enumerate(times)]
            for kind, seconds in enumerate(found):
                self.chunks[kind][rows] = seconds

    def _sample_together(
        self, points: Sequence[tuple[int, Sequence[Callable[[], float]]]], *, share: float, most: int
    ) -> dict[int, list[float]]:
        """The times of all points' steps, by rows, taken in turn: what another program does meanwhile hits them all."""
        times = iter(self.timer.sample([step for _, steps in points for step in steps], share=share, max_samples=most))
        return {rows: [next(times) for _ in steps] for rows, steps in points}

    def _with_context(self, kind: int) -> LayerTimes:
        """The kind's grids: what was measured at short context, and what a long one adds on the single layer."""
        self.on_progress("long contexts")
        stage, layers = self.loaded.singles[kind], self.loaded.singles[kind].num_layers
        chunk_rows = tuple(self.chunks[kind])
        chunk = chunk_rows[-1]
        # How far a prompt can be filled in a part of the budget.
        share_s = _CONTEXT_SHARE * self.timer.budget_s / (2 * len(self.loaded.singles))
        room = stage.spec.context_tokens - _MAX_CHUNK_SAMPLES * sum(chunk_rows) - 2 * _MAX_STEP_SAMPLES
        fits = int(share_s / (self.chunks[kind][chunk] * layers)) * chunk
        long = min(LONG_CONTEXT, room, fits) // chunk * chunk
        decode_rows = tuple(self.short[kind])
        short = [self.short[kind][rows] for rows in decode_rows]
        if long <= 2 * SHORT_CONTEXT:  # Too slow, or too short a context, for there to be a difference.
            return LayerTimes(
                decode=_grid(decode_rows, (SHORT_CONTEXT,), [short]),
                prefill=_grid(chunk_rows, (0,), [[self.chunks[kind][rows] for rows in chunk_rows]]),
            )
        middle = min(PREFILL_CONTEXT, max(long // 2 // chunk, 1) * chunk)
        sequences = stage.open(1)
        while stage.length(sequences[0]) < middle:
            stage.step(sequences, chunk, num_logits=0)
        added = self._prefill_added(stage, sequences, chunk_rows, middle)
        while stage.length(sequences[0]) + chunk <= long:
            stage.step(sequences, chunk, num_logits=0)
        reached = stage.length(sequences[0])
        per_row = self._decode_added(stage, sequences)
        stage.release(sequences)
        # Each sequence attends to its own KV, on both backends: what context adds grows with their number.
        late = [seconds + per_row / layers * rows for seconds, rows in zip(short, decode_rows, strict=True)]
        contexts: tuple[int, ...] = (SHORT_CONTEXT, reached)
        columns = [short, late]
        window = stage.window
        if window is not None and SHORT_CONTEXT < window < reached:  # From there on, nothing is added any more.
            contexts, columns = (SHORT_CONTEXT, window, reached), [short, late, late]
        early = [self.chunks[kind][rows] for rows in chunk_rows]
        return LayerTimes(
            decode=_grid(decode_rows, contexts, columns),
            prefill=_grid(
                chunk_rows, (0, middle), [early, [a + b / layers for a, b in zip(early, added, strict=True)]]
            ),
        )

    def _prefill_added(
        self, stage: TimedStage, sequences: Sequence[SequenceId], chunk_rows: tuple[int, ...], context: int
    ) -> list[float]:
        """What a chunk after `context` takes more than a first one, for each size, on the single layer.

        The sequence grows while it is measured, and what context adds grows in proportion.
        """
        added = []
        for rows in chunk_rows:
            before = stage.length(sequences[0])
            late, first = self.timer.sample(
                [_later_chunk_step(stage, sequences, rows), _first_chunk_step(stage, rows)],
                share=_CONTEXT_SHARE / (10 * len(self.loaded.singles)),
                max_samples=_MAX_CHUNK_SAMPLES,
            )
            mean_context = (before + stage.length(sequences[0]) - rows) / 2
            added.append(max(0.0, late - first) * context / mean_context)
        return added

    def _decode_added(self, stage: TimedStage, sequences: Sequence[SequenceId]) -> float:
        """What a decode step after `sequences`' context takes more than one of short context, for one sequence."""
        brief = stage.open(1)
        stage.step(brief, SHORT_CONTEXT - 8, num_logits=0)
        run = self.loaded.run
        cold = run.open(1)

        # As between two steps of a real stage, the KV should leave the caches; on a slow device it makes no difference,
        # and would leave time for one sample only.
        is_fast = self.run_s < _FAST_SHARE * self.timer.budget_s

        def evicting(measured: Sequence[SequenceId]) -> Callable[[], float]:
            def step() -> float:
                if is_fast:
                    run.step(cold)
                return stage.step(measured)

            return step

        late, early = self.timer.sample(
            [evicting(sequences), evicting(brief)],
            share=_CONTEXT_SHARE / (2 * len(self.loaded.singles)),
            max_samples=_MAX_STEP_SAMPLES,
        )
        stage.release(brief)
        run.release(cold)
        return max(0.0, late - early)

    def _step_s(self, run_s: float, single_s: Sequence[float]) -> float:
        """Solve run = step + Σ layers and single = step + layer for the step."""
        weights = self._singles_in_run()
        unknowns = sum(weights) - 1
        if unknowns <= 0:
            return 0.0
        step = (sum(w * seconds for w, seconds in zip(weights, single_s, strict=True)) - run_s) / unknowns
        # Neither a step nor a layer takes less than nothing, whatever the noise says. (Under a CPU quota a step can
        # seem to: what was saved up while it waited is spent at once. The run's time has that in it.)
        return min(max(step, 0.0), 0.95 * min(single_s))

    def _split_by_kind(self, run_s: float, single_s: Sequence[float]) -> list[float]:
        """Seconds of a layer of each kind: the run's time, in the proportions of the single layers."""
        weights = self._singles_in_run()
        if len(weights) == 1:
            return [max(run_s - self.step_s, 0.05 * run_s) / len(self.loaded.kinds)]
        alone = [self._layer_of_single(kind, seconds) for kind, seconds in enumerate(single_s)]
        whole = sum(alone[kind] for kind in self.loaded.kinds)
        factor = max(run_s - self.step_s, 0.05 * run_s) / whole
        return [factor * seconds for seconds in alone]

    def _layer_of_single(self, kind: int, seconds: float) -> float:
        return max(seconds - self.step_s, 0.05 * seconds) / self.loaded.singles[kind].num_layers

    def _singles_in_run(self) -> list[float]:
        """How many of each single stage the run's layers make."""
        counts = Counter(self.loaded.kinds)
        return [counts[kind] / stage.num_layers for kind, stage in enumerate(self.loaded.singles)]


def _decode_step(stage: TimedStage, sequences: Sequence[SequenceId]) -> Callable[[], float]:
    """A decode step of sequences that hold the short context; those that are new are filled first."""
    new = [sequence for sequence in sequences if stage.length(sequence) == 0]
    if new:
        stage.step(new, SHORT_CONTEXT - 8, num_logits=0)
    stage.step(sequences)
    return lambda: stage.step(sequences)


def _first_chunk_step(stage: TimedStage, rows: int) -> Callable[[], float]:
    return lambda: stage.time_first_chunk(rows)


def _later_chunk_step(stage: TimedStage, sequences: Sequence[SequenceId], rows: int) -> Callable[[], float]:
    return lambda: stage.step(sequences, rows, num_logits=0)


def _grid(rows: tuple[int, ...], contexts: tuple[int, ...], columns: Sequence[Sequence[float]]) -> Grid:
    """From columns, one a context."""
    return Grid(rows=rows, contexts=contexts, seconds=tuple(zip(*columns, strict=True)))


OnProgress = Callable[[str], None]

_LARGEST_EMBEDDING_BYTES = 256 << 20
"""To read a larger one would take longer than all that is measured, for a lookup that takes next to nothing."""


class Profiler:
    """Measures once (`profile`), and then again while other devices work (`measure_under_load`)."""

    def __init__(self, checkpoint: Checkpoint, settings: ProfileSettings, *, on_progress: OnProgress) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._on_progress = on_progress
        self._timer = SampleTimer(settings.budget_s)
        weights = supported_form(
            settings.backend,
            checkpoint.config,
            settings.weights,
            stacked_experts=checkpoint.spec.stacked_experts,
        )
        self._kinds = layer_kinds(checkpoint, weights)
        self._sizes = checkpoint.spec.part_bytes(settings.backend, settings.dtype, weights)
        self._run: TimedStage | None = None

    def profile(self) -> ProfileReport:
        """Raises PotluckError where a stage can't be loaded or run."""
        self._on_progress("loading layers")
        choice = choose_spans(self._checkpoint.spec, self._kinds, self._sizes.layers, self._settings.memory_bytes)
        run = self._run = self._load(choice.run)
        loaded = ProfiledStages(
            run=run,
            kinds=self._kinds[choice.run.first : choice.run.last],
            singles=tuple(self._load(span) for span in choice.singles),
        )
        use = CpuUse()
        probe = LayerProbe(loaded=loaded, timer=self._timer, on_progress=self._on_progress)
        layers = probe.measure()
        steady_s = self.measure_under_load(0.06 * self._settings.budget_s)
        others_share = use.others_share()
        head = self._lm_head(probe, choice)
        embed = self._embedding(probe, choice)
        return ProfileReport(
            kinds=self._kinds,
            layers=layers,
            embed=embed,
            lm_head=head,
            step_s=probe.step_s,
            under_load_s=steady_s,
            others_share=others_share,
        )

    def measure_under_load(self, seconds: float) -> float:
        """Run decode steps of one sequence without a pause; the median second of one. After `profile`."""
        assert self._run is not None, "profile comes first"
        run = self._run
        sequences = run.open(1)
        run.step(sequences, 8, num_logits=0)
        taken: list[float] = []
        ends_at = time.perf_counter() + seconds
        while time.perf_counter() < ends_at or len(taken) < 3:
            taken.append(run.step(sequences))
        run.release(sequences)
        return statistics.fmean(taken) if len(taken) < 5 else statistics.median(taken)

    def _lm_head(self, probe: LayerProbe, choice: MeasuredSpans) -> Grid:
        spec = self._checkpoint.spec
        span = shortest_end_span(spec, first=False)
        if not self._fits(self._sizes.lm_head + self._sizes.norm, span):
            # It can't be had here: as many bytes as some layers, read at the same speed.
            kind = self._kinds[-1]
            worth = self._sizes.lm_head / self._sizes.layers[-1]
            rows = tuple(probe.short[kind])
            return grid_without_context(rows, [worth * probe.layer_s(kind, count) for count in rows])
        self._on_progress("the head")
        return self._end_times(probe, choice, span, kind=self._kinds[-1])

    def _embedding(self, probe: LayerProbe, choice: MeasuredSpans) -> Grid:
        spec = self._checkpoint.spec
        span = shortest_end_span(spec, first=True)
        if self._sizes.embed > _LARGEST_EMBEDDING_BYTES or not self._fits(self._sizes.embed, span):
            return grid_without_context((1,), [0.0])
        self._on_progress("the embedding")
        grid = self._end_times(probe, choice, span, kind=self._kinds[0])
        # A lookup takes less than the noise of what it is taken from: no slope by rows, which would go on for prompts.
        return grid_without_context((1,), [statistics.median(seconds for (seconds,) in grid.seconds)])

    def _end_times(self, probe: LayerProbe, choice: MeasuredSpans, span: LayerSpan, *, kind: int) -> Grid:
        single = choice.singles[kind]
        ours = sum(probe.layer_s(self._kinds[layer]) for layer in range(span.first, span.last))
        theirs = sum(probe.layer_s(self._kinds[layer]) for layer in range(single.first, single.last))
        return embedding_and_lm_head_times(self._load(span), probe.loaded.singles[kind], ours - theirs, self._timer)

    def _fits(self, end_bytes: int, span: LayerSpan) -> bool:
        """Whether a stage of `span`, with an end of the model, has room beside what is loaded."""
        if self._settings.memory_bytes is None:
            return True
        needed = end_bytes + sum(self._sizes.layers[span.first : span.last])
        held = sum(stage.weights_bytes for stage in (self._run,) if stage is not None)
        return needed + 2 * held <= self._settings.memory_bytes

    def _load(self, span: LayerSpan) -> TimedStage:
        settings = self._settings
        return TimedStage(
            self._checkpoint,
            span,
            backend=settings.backend,
            device=settings.device,
            dtype=settings.dtype,
            weights=settings.weights,
        )
