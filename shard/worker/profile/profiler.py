"""The profiler decides which stages are loaded to measure a model, in what order, and what is reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from shard.formats.checkpoint import Checkpoint, supported_form
from shard.worker.profile.layers import LayerProbe, ProfiledStages, embedding_and_lm_head_times, grid_without_context
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
from transport.messages.measure import Grid, ProfileReport
from transport.process.cpu_use import CpuUse

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
