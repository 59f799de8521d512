"""Profiles find what layers take: exactly where time is made up, closely where it is real; and their failures have
names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard.formats.affine import AffineForm, quantize_rows
from shard.formats.spec import Backend, ModelSpec
from shard.pieces.open import open_checkpoint
from shard.worker.profile.profiler import LayerProbe, ProfiledStages, Profiler
from shard.worker.profile.report import ProfileSettings
from shard.worker.profile.timed_stage import (
    LayerSpan,
    SampleTimer,
    TimedStage,
    choose_spans,
    interquartile_mean,
    layer_kinds,
)
from tests.support.needs import NEEDS_MLX
from tests.support.shard.tiny import memory_checkpoint, tiny_model
from transport.messages.measure import Grid
from transport.messages.ring import SequenceId

TINY = ProfileSettings(backend="torch", device="cpu", dtype="float32", budget_s=0.5)


# Which layers are measured for which.


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("llama", (0, 0, 0, 0)), ("gemma3_text", (0, 1, 0, 0)), ("qwen3_moe", (0, 1, 0, 0)), ("mixtral", (0, 0, 0, 0))],
)
def test_layers_of_a_kind_are_alike(family: str, kinds: tuple[int, ...], tmp_path: Path) -> None:
    assert layer_kinds(memory_checkpoint(tiny_model(family, 0), tmp_path), "stored") == kinds


def test_layers_that_are_stored_in_other_bits_are_of_another_kind_unless_all_is_held_dense(tmp_path: Path) -> None:
    """As in GGUF's Q4_K_M, which has some layers' down projections in 6 bits."""
    checkpoint = memory_checkpoint(tiny_model("llama", 0), tmp_path)
    for layer, bits in ((0, 4), (1, 8), (2, 4)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        array = checkpoint.arrays[name]
        checkpoint.affine[name] = (AffineForm(bits=bits, group=32), quantize_rows(array, bits, 32))
    assert layer_kinds(checkpoint, "stored") == (0, 1, 0, 2)
    assert layer_kinds(checkpoint, "dense") == (0, 0, 0, 0)
    assert layer_kinds(checkpoint, "8-bit") == (0, 1, 0, 1)


def spec(num_layers: int, layer_params: int, cuts: tuple[int, ...] | None = None) -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        num_layers=num_layers,
        hidden_size=64,
        vocab_size=100,
        context_tokens=4096,
        tied_embeddings=False,
        layer_params=(layer_params,) * num_layers,
        embed_params=6400,
        norm_params=64,
        head_params=6400,
        kv_elements_per_token=(64,) * num_layers,
        windows=(None,) * num_layers,
        legal_cuts=tuple(range(1, num_layers)) if cuts is None else cuts,
        stored_dtype="BF16",
        file_bytes=0,
    )


def layer_bytes(model: ModelSpec) -> tuple[int, ...]:
    return model.part_bytes("torch", "bfloat16", "stored").layers


@given(st.data())
def test_what_is_loaded_is_few_layers_at_legal_cuts_that_cover_every_kind(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 40))
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=num_layers, max_size=num_layers))
    kinds = [sorted(set(kinds)).index(kind) for kind in kinds]
    cuts = data.draw(st.sets(st.integers(1, num_layers - 1))) if num_layers > 1 else set()
    model = spec(num_layers, data.draw(st.sampled_from([10**4, 3_500_000, 10**9])), tuple(sorted(cuts)))
    chosen = choose_spans(model, kinds, layer_bytes(model))
    ends = {0, num_layers, *cuts}
    longest = max(b - a for a, b in zip(sorted(ends), sorted(ends)[1:], strict=False))
    assert {chosen.run.first, chosen.run.last} <= ends
    assert chosen.run.num_layers <= 32 + longest
    for kind, span in enumerate(chosen.singles):
        assert {span.first, span.last} <= ends
        assert kind in kinds[span.first : span.last]
        assert span.num_layers <= longest


def test_large_layers_are_few_and_small_ones_leave_the_caches() -> None:
    large, small_spec = spec(80, 850_000_000), spec(30, 3_500_000)
    assert choose_spans(large, [0] * 80, layer_bytes(large)).run.num_layers == 2
    small = choose_spans(small_spec, [0] * 30, layer_bytes(small_spec)).run
    assert small.num_layers * 7_000_000 > 64 << 20
    assert small.first > 0 and small.last < 30
    room_bytes = 4 * 2 * 3_500_000
    assert choose_spans(small_spec, [0] * 30, layer_bytes(small_spec), room_bytes).run.num_layers == 3
    middle = spec(30, 17_000_000)
    assert choose_spans(middle, [0] * 30, layer_bytes(middle)).run.num_layers == 2
    in_4_bits = [size * 5 // 16 for size in layer_bytes(middle)]
    assert choose_spans(middle, [0] * 30, in_4_bits).run.num_layers == 7
    tiny = [2_200_000] * 30  # SmolLM2 in 4 bits
    assert choose_spans(small_spec, [0] * 30, tiny).run.num_layers > 28


# The arithmetic, on a device whose times are known.


@dataclass
class Now:
    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class MadeUpStage:
    """step_s + Σ layers of (base + row · rows + attend · tokens · context), by kind."""

    now: Now
    layers: Sequence[int]
    truth: dict[int, tuple[float, float, float]]
    step_s: float
    spec: Any
    window: int | None = None
    held: dict[SequenceId, int] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def length(self, sequence: SequenceId) -> int:
        return self.held[sequence]

    def open(self, count: int) -> tuple[SequenceId, ...]:
        new = tuple(SequenceId(len(self.held) + i) for i in range(count))
        self.held.update(dict.fromkeys(new, 0))
        return new

    def release(self, sequences: Sequence[SequenceId]) -> None:
        for sequence in sequences:
            self.held[sequence] = 0

    def step(self, sequences: Sequence[SequenceId], num_tokens: int = 1, num_logits: int = 1) -> float:
        seconds = self.step_s
        for kind in self.layers:
            base, row, attend = self.truth[kind]
            seconds += base + row * len(sequences) * num_tokens
            seconds += sum(attend * num_tokens * self.held[sequence] for sequence in sequences)
        for sequence in sequences:
            self.held[sequence] += num_tokens
        self.now.seconds += seconds
        return seconds

    def time_first_chunk(self, num_tokens: int) -> float:
        return self.step(self.open(1), num_tokens)


def near(grid: Grid, row: int, column: int, expected: float) -> None:
    assert grid.seconds[row][column] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("num_kinds", [1, 2])
@settings(max_examples=40, deadline=None)
@given(
    base=st.floats(1e-4, 3e-3),
    row=st.floats(1e-6, 1e-4),
    attend=st.floats(1e-8, 1e-6),
    step=st.floats(0, 5),
    ratio=st.floats(0.2, 5),
)
def test_known_times_are_found(
    num_kinds: int, base: float, row: float, attend: float, step: float, ratio: float
) -> None:
    truth = {0: (base, row, attend), 1: (base * ratio, row * ratio, attend)}
    step_s = step * base * min(1, ratio)  # Of one that dwarfs its layers, less is found.
    now = Now()
    facts = type("Spec", (), {"context_tokens": 8192})()
    run = [index % num_kinds for index in range(6)]

    def stage(layers: Sequence[int]) -> Any:
        return MadeUpStage(now, layers, truth, step_s, facts)

    loaded = ProfiledStages(run=stage(run), kinds=tuple(run), singles=tuple(stage([kind]) for kind in range(num_kinds)))
    probe = LayerProbe(loaded=loaded, timer=SampleTimer(6.0, now=now, sleep=now.sleep), on_progress=lambda what: None)
    reports = probe.measure()
    # Contexts grow a little while they are measured.
    drift = 100 * attend * 8
    assert probe.step_s == pytest.approx(step_s, abs=drift + 0.05 * base * max(1, ratio))
    for kind, report in enumerate(reports):
        layer_base, layer_row, layer_attend = truth[kind]
        for i, rows in enumerate(report.decode.rows):
            for j, context in enumerate(report.decode.contexts):
                expected = layer_base + rows * (layer_row + layer_attend * context)
                assert report.decode.seconds[i][j] == pytest.approx(expected, rel=0.1, abs=2 * drift)
        for i, rows in enumerate(report.prefill.rows):
            for j, context in enumerate(report.prefill.contexts):
                expected = layer_base + rows * (layer_row + layer_attend * context)
                assert report.prefill.seconds[i][j] == pytest.approx(expected, rel=0.1, abs=2 * drift)


def test_a_slow_device_gets_fewer_points_and_still_ends() -> None:
    now = Now()
    truth = {0: (0.3, 0.3, 1e-5)}  # 0.6 s a layer and token, as a phone might.
    facts = type("Spec", (), {"context_tokens": 8192})()
    stages = [MadeUpStage(now, [0] * count, truth, 0.0, facts) for count in (4, 1)]
    loaded: Any = ProfiledStages(run=stages[0], kinds=(0,) * 4, singles=(stages[1],))  # type: ignore[arg-type]
    (report,) = LayerProbe(
        loaded=loaded, timer=SampleTimer(5.0, now=now, sleep=now.sleep), on_progress=lambda what: None
    ).measure()
    assert report.decode.rows == (1,)
    assert report.prefill.rows == (16,)
    near(report.decode, 0, 0, 0.6)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40))
def test_a_typical_time_is_among_the_samples_and_deaf_to_a_few(samples: list[float]) -> None:
    assert min(samples) - 1e-9 <= interquartile_mean(samples) <= max(samples) + 1e-9
    many = samples * 4
    few = [1e6] * (len(many) // 5)
    assert interquartile_mean(many + few) <= max(samples) + 1e-9


def test_a_typical_time_of_two_modes_is_their_mean() -> None:
    assert interquartile_mean([1.0, 3.0] * 20) == pytest.approx(2.0)


# Real layers.


@pytest.mark.parametrize(
    ("family", "backend"),
    [("llama_tied", "torch"), ("gemma3_text", "torch"), ("qwen3_moe", "torch"), ("llama", "mlx"), ("mistral", "torch")],
)
def test_a_tiny_model_is_profiled(family: str, backend: Backend, tmp_path: Path) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core", reason=NEEDS_MLX)
    checkpoint = memory_checkpoint(tiny_model(family, 0), tmp_path)
    asked = ProfileSettings(backend=backend, device="mlx" if backend == "mlx" else "cpu", dtype="float32", budget_s=0.5)
    said: list[str] = []
    profiler = Profiler(checkpoint, asked, on_progress=said.append)
    report = profiler.profile()
    assert report.is_plausible()
    assert len(report.kinds) == checkpoint.spec.num_layers
    assert all(seconds > 0 for layer in report.layers for row in layer.decode.seconds for seconds in row)
    assert "the head" in said
    assert 0 < profiler.measure_under_load(0.1) < 1.0


def test_a_device_without_room_for_the_head_is_profiled_without_it(tmp_path: Path) -> None:
    checkpoint = memory_checkpoint(tiny_model("llama", 0), tmp_path)
    asked = ProfileSettings(backend="torch", device="cpu", dtype="float32", budget_s=0.3, memory_bytes=1)
    said: list[str] = []
    report = Profiler(checkpoint, asked, on_progress=said.append).profile()
    assert report.is_plausible()
    assert "the head" not in said


def test_predicted_and_real_stages_of_smollm2(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Halves of the model against what its profile predicts, taken in turn. Loose: tests share the machine."""
    checkpoint = open_checkpoint(smollm2_path)
    asked = ProfileSettings(backend="torch", device="cpu", dtype="bfloat16", budget_s=2.5)
    halves = (LayerSpan(first=0, last=15), LayerSpan(first=15, last=30))
    stages = [TimedStage(checkpoint, span, backend="torch", device="cpu", dtype="bfloat16") for span in halves]
    ratios = []
    for _ in range(2):
        report = Profiler(checkpoint, asked, on_progress=lambda what: None).profile()
        for stage in stages:
            predicted_s = report.step_s + stage.num_layers * report.layers[0].decode.seconds[0][0]
            predicted_s += (report.embed if stage.spec.is_first else report.lm_head).seconds[0][0]
            sequences = stage.open(1)
            stage.step(sequences, 24, num_logits=0)
            real_s = SampleTimer(2.0).sample([lambda stage=stage, held=sequences: stage.step(held)], share=0.4)[0]
            stage.release(sequences)
            ratios.append(predicted_s / real_s)
    with capsys.disabled():
        print(f"\npredicted / real decode of SmolLM2's halves: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    assert 0.4 < np.median(ratios) < 2.5
