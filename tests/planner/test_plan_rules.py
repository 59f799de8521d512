"""Plans partition the layers exactly, never exceed memory, exist whenever any split fits, and follow bandwidth."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.hardware.device import Device
from planner.explain import stage_rows
from planner.measurements import SAME_HOST, STEP_S, estimated_pool
from planner.memory import CPU_RESERVE_BYTES, WINDOW_SLACK_TOKENS, ModelProfile, WeightSizes
from planner.options import Workload
from planner.plan import Plan
from planner.solve import make_plan
from tests.support.planner.pool import GIB, MIB, device, model, part_bytes, quantizable
from transport.errors import ConfigError, DoesNotFit


def plan_proportional(
    profile: ModelProfile, devices: Sequence[Device], tokens: int, at_once: int, *, use_all: bool = False
) -> Plan:
    work = Workload(context_tokens=tokens, concurrency=at_once)
    return make_plan(profile, estimated_pool(profile, devices, "here"), work, "proportional", use_all=use_all)


def _memory_bytes(profile: ModelProfile, target: Device, first: int, last: int, tokens: int, at_once: int) -> int:
    """Written out again, so that a slip in the planner's own sum shows."""
    width = 4 if target.compute_dtype == "float32" else 2
    (sizes,) = (
        sizes
        for sizes in profile.sizes
        if (sizes.weights, sizes.backend, sizes.dtype) == (profile.weights, target.backend, target.compute_dtype)
    )
    total = sum(sizes.layers[first:last])
    total += sizes.embed if first == 0 else 0
    if last == profile.num_layers:
        total += sizes.norm
        total += 0 if profile.tied_embeddings and first == 0 else sizes.head
    for layer in range(first, last):
        window = profile.windows[layer]
        held = tokens if window is None else min(tokens, window + WINDOW_SLACK_TOKENS)
        total += profile.kv_elements_per_token[layer] * held * at_once * width
    return total + CPU_RESERVE_BYTES


def _fits(profile: ModelProfile, placed: Sequence[tuple[Device, int, int]], tokens: int, at_once: int) -> bool:
    by_pool: dict[str, int] = defaultdict(int)
    for target, first, last in placed:
        needed = _memory_bytes(profile, target, first, last, tokens, at_once)
        if needed > target.free_bytes:
            return False
        by_pool[target.memory_pool] += needed
    return all(by_pool[target.memory_pool] <= target.total_bytes for target, _, _ in placed)


def _any_fits(profile: ModelProfile, devices: Sequence[Device], tokens: int, at_once: int) -> bool:
    """Every subset of the devices, in order, with every choice of legal cuts."""
    for count in range(1, len(devices) + 1):
        for chosen in itertools.combinations(devices, count):
            for cuts in itertools.combinations(profile.legal_cuts, count - 1):
                spans = itertools.pairwise([0, *cuts, profile.num_layers])
                placed = [(target, first, last) for target, (first, last) in zip(chosen, spans, strict=True)]
                if _fits(profile, placed, tokens, at_once):
                    return True
    return False


@st.composite
def profiles(draw: st.DrawFn) -> ModelProfile:
    num_layers = draw(st.integers(1, 8))
    each = st.integers(1, 60)
    params = draw(st.lists(each, min_size=num_layers, max_size=num_layers))
    cuts = draw(st.sets(st.sampled_from(range(1, num_layers)))) if num_layers > 1 else set()
    windows = draw(st.lists(st.sampled_from([None, 64]), min_size=num_layers, max_size=num_layers))
    quantized = draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers))
    embed, head = draw(each), draw(each)
    sizes = tuple(
        WeightSizes(
            weights="stored",
            backend="torch",
            dtype=dtype,
            layers=tuple(int(p * MIB * (0.6 if q else width)) for p, q in zip(params, quantized, strict=True)),
            embed=int(embed * MIB * width),
            norm=64 * width,
            head=int(head * MIB * 0.6),
        )
        for dtype, width in (("bfloat16", 2), ("float32", 4))
    )
    return model(
        num_layers,
        layer_params=tuple(p * MIB for p in params),
        head_params=head * MIB,
        sizes=sizes,
        tied_embeddings=draw(st.booleans()),
        legal_cuts=tuple(sorted(cuts)),
        windows=tuple(windows),
    )


@st.composite
def pools(draw: st.DrawFn) -> list[Device]:
    totals = {
        pool: draw(st.integers(0, 900)) * MIB + draw(st.sampled_from([1, 2])) * CPU_RESERVE_BYTES for pool in "ab"
    }
    found = []
    for index in range(draw(st.integers(1, 4))):
        pool = draw(st.sampled_from(["a", "b"]))
        found.append(
            device(
                f"d{index}",
                gb_per_s=draw(st.floats(0.1, 100)),
                compute_dtype=draw(st.sampled_from(["bfloat16", "float32"])),
                memory_pool=pool,
                total_bytes=totals[pool],
                free_bytes=min(totals[pool], draw(st.integers(0, 900)) * MIB + CPU_RESERVE_BYTES),
            )
        )
    return found


@settings(deadline=None, max_examples=300)
@given(profile=profiles(), devices=pools(), tokens=st.integers(1, 8192), at_once=st.integers(1, 4), all_=st.booleans())
def test_plans_fit_exactly_when_any_cut_does(
    profile: ModelProfile, devices: list[Device], tokens: int, at_once: int, all_: bool
) -> None:
    try:
        plan = plan_proportional(profile, devices, tokens, at_once, use_all=all_)
    except DoesNotFit as error:
        assert not _any_fits(profile, devices, tokens, at_once)
        assert "GiB" in error.message and error.hint
        return
    by_name = {d.name: d for d in devices}
    spans = [(by_name[stage.device], stage.first, stage.last) for stage in plan.stages]
    assert [first for _, first, _ in spans] == [0, *(last for _, _, last in spans[:-1])]
    assert spans[-1][2] == profile.num_layers
    assert all(first < last for _, first, last in spans)
    assert {last for _, _, last in spans[:-1]} <= set(profile.legal_cuts)
    assert _fits(profile, spans, tokens, at_once)
    assert sorted([s.device for s in plan.stages] + [out.name for out in plan.left_out]) == sorted(by_name)
    assert [s.device for s in plan.stages] == [d.name for d in devices if d.name in {s.device for s in plan.stages}]


@given(num_layers=st.integers(1, 80), speeds=st.lists(st.floats(0.5, 100), min_size=1, max_size=6))
@settings(deadline=None, max_examples=80)
def test_ample_memory_gives_layers_within_one_of_the_share(num_layers: int, speeds: list[float]) -> None:
    profile = model(num_layers, head_params=0, norm_params=0)
    devices = [device(f"d{i}", gb_per_s=speed) for i, speed in enumerate(speeds)]
    plan = plan_proportional(profile, devices, 4096, 1)
    given_layers = {stage.device: stage.num_layers for stage in plan.stages}
    for target, speed in zip(devices, speeds, strict=True):
        assert abs(given_layers.get(target.name, 0) - num_layers * speed / sum(speeds)) < 1 + 1e-6


def _counts(plan: Plan) -> list[int]:
    return [stage.num_layers for stage in plan.stages]


def test_one_device_holds_all() -> None:
    plan = plan_proportional(model(), [device("only")], 4096, 2)
    assert [(s.device, s.first, s.last) for s in plan.stages] == [("only", 0, 8)]
    assert plan.kv_capacity_tokens == 8192
    assert plan.stages[0].kv_bytes == 8 * 512 * 2 * 4096 * 2


def test_kv_in_8_bits_is_a_byte_an_element_and_a_scale_for_each_head() -> None:
    full = plan_proportional(model(), [device("only")], 4096, 2)
    half = plan_proportional(model(head_dim=64, kv="8-bit"), [device("only")], 4096, 2)
    heads = 512 // 64
    assert half.stages[0].kv_bytes == 8 * heads * (64 + 4) * 4096 * 2
    assert full.stages[0].memory_bytes - half.stages[0].memory_bytes == (
        full.stages[0].kv_bytes - half.stages[0].kv_bytes
    )
    assert (full.kv, half.kv) == ("full", "8-bit")
    assert full.id != half.id


def test_kv_in_8_bits_of_heads_of_unknown_width_can_not_be_planned() -> None:
    with pytest.raises(ConfigError, match="KV in 8 bits"):
        plan_proportional(model(kv="8-bit"), [device("only")], 4096, 2)


def test_times_are_no_part_of_a_plans_id() -> None:
    plan = plan_proportional(model(), [device("only")], 4096, 2)
    assert plan.times
    assert replace(plan, times=()).id == plan.id


def test_float32_halves_a_devices_speed_and_doubles_its_bytes() -> None:
    profile = model(9, head_params=0)
    plan = plan_proportional(profile, [device("bf16"), device("fp32", compute_dtype="float32")], 4096, 1)
    assert _counts(plan) == [6, 3]
    assert plan.stages[1].weights_bytes == 4 * (3 * profile.layer_params[0] + 64)
    assert plan.stages[0].decode_s == pytest.approx(plan.stages[1].decode_s, rel=0.05)
    assert plan.wire_dtype == "bfloat16"


def test_the_head_is_work_and_the_embedding_is_not() -> None:
    layer = model().layer_params[0]
    plan = plan_proportional(model(8, head_params=4 * layer), [device("a"), device("b")], 4096, 1)
    assert _counts(plan) == [6, 2]
    plan = plan_proportional(model(8, head_params=0, embed_params=4 * layer), [device("a"), device("b")], 4096, 1)
    assert _counts(plan) == [4, 4]


def test_memory_caps_move_layers_to_where_they_fit() -> None:
    fast_but_small = device("small", gb_per_s=100, usable_mib=260)
    plan = plan_proportional(model(8, embed_params=0), [fast_but_small, device("large", gb_per_s=1)], 1024, 1)
    assert _counts(plan) == [2, 6]


def test_devices_of_one_pool_share_its_memory() -> None:
    pool = {"memory_pool": "ram", "total_bytes": 500 * MIB + 2 * CPU_RESERVE_BYTES}
    profile = model(8, embed_params=0, head_params=0)
    devices = [device("cpu-1", **pool), device("cpu-2", **pool), device("gpu", gb_per_s=1)]
    plan = plan_proportional(profile, devices, 1024, 1)
    assert _counts(plan)[2] == 4  # 4 layers and their KV are 404 MiB; a fifth would fit with one CPU's worker alone
    assert sum(_counts(plan)) == 8


def test_a_slow_device_is_left_out_with_the_reason_unless_all_must_serve() -> None:
    devices = [device("fast", gb_per_s=100), device("slow", gb_per_s=0.1)]
    plan = plan_proportional(model(), devices, 4096, 1)
    assert [s.device for s in plan.stages] == ["fast"]
    assert [out.name for out in plan.left_out] == ["slow"]
    assert "less than a layer" in plan.left_out[0].reason
    assert _counts(plan_proportional(model(), devices, 4096, 1, use_all=True)) == [7, 1]


def test_a_device_too_small_for_one_layer_is_left_out_with_the_reason() -> None:
    devices = [device("tiny", usable_mib=10), device("large")]
    plan = plan_proportional(model(), devices, 4096, 1, use_all=True)
    assert [s.device for s in plan.stages] == ["large"]
    assert "can't hold one layer" in plan.left_out[0].reason


def test_more_devices_than_layers() -> None:
    devices = [device(f"d{i}") for i in range(5)]
    plan = plan_proportional(model(3), devices, 4096, 1, use_all=True)
    assert _counts(plan) == [1, 1, 1]
    assert len(plan.left_out) == 2


def test_a_tied_head_is_held_twice_only_when_the_ring_has_two_ends() -> None:
    profile = model(2, tied_embeddings=True)
    one = plan_proportional(profile, [device("a")], 1024, 1)
    two = plan_proportional(profile, [device("a"), device("b")], 1024, 1)
    assert sum(s.weights_bytes for s in two.stages) - one.stages[0].weights_bytes == 2 * profile.head_params


def test_what_a_form_takes_is_what_is_planned_and_told_by_the_id() -> None:
    stored, small = (
        plan_proportional(replace(quantizable(), weights=form), [device("a")], 4096, 1) for form in ("stored", "4-bit")
    )
    assert stored.stages[0].weights_bytes == 900 * MIB + 2 * 64
    assert small.stages[0].weights_bytes == int(0.625 * 450 * MIB) + 40
    assert (stored.weights, small.weights) == ("stored", "4-bit")
    assert stored.id != small.id
    assert small.stages[0].decode_s < 0.4 * stored.stages[0].decode_s


def test_a_device_that_reads_less_for_a_layer_gets_more_of_them() -> None:
    counts = ((50 * MIB,) * 9, 0, 0, 0)
    sizes = (
        part_bytes("stored", "torch", "bfloat16", 2, counts),
        part_bytes("stored", "mlx", "bfloat16", 1, counts),
    )
    devices = [device("dense"), device("quantized", backend="mlx", kind="mlx")]
    plan = plan_proportional(model(9, sizes=sizes), devices, 4096, 1)
    assert _counts(plan) == [3, 6]


@pytest.mark.parametrize(
    ("usable_mib", "says", "gib"),
    [(950, None, None), (600, "8", 1.125), (330, "4", 0.625), (200, None, None)],
)
def test_does_not_fit_says_which_form_would_and_only_if_it_does(
    usable_mib: int, says: str | None, gib: float | None
) -> None:
    devices = [device("a", usable_mib=usable_mib)]
    profile = quantizable()
    if usable_mib == 950:
        plan_proportional(profile, devices, 4096, 1)
        return
    with pytest.raises(DoesNotFit) as caught:
        plan_proportional(profile, devices, 4096, 1)
    if says is None or gib is None:
        assert "--quantize" not in caught.value.hint
        return
    needed = (gib * 450 * MIB + 8 * 1024 * 4096 + CPU_RESERVE_BYTES) / GIB
    assert f"--quantize {says} would fit, with {needed:.2f} GiB" in caught.value.hint
    plan_proportional(replace(profile, weights=f"{says}-bit"), devices, 4096, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("usable_mib", "says"), [(350, "--quantize 8 would fit; or give it"), (100, "give it fewer")])
def test_layers_by_hand_that_do_not_fit_say_which_form_would(usable_mib: int, says: str) -> None:
    devices = [device("small", usable_mib=usable_mib), device("large")]
    counts = (("small", 4), ("large", 4))
    pool = estimated_pool(quantizable(), devices, "here")
    with pytest.raises(DoesNotFit, match="small: these layers need") as caught:
        make_plan(quantizable(), pool, Workload(context_tokens=4096, concurrency=1), layers=counts)
    assert caught.value.hint.startswith(says)
    if usable_mib == 350:
        smaller = replace(quantizable(), weights="8-bit")
        assert make_plan(smaller, pool, Workload(context_tokens=4096, concurrency=1), layers=counts).stages


def test_a_kind_of_device_that_nothing_is_known_of_is_named() -> None:
    profile = replace(quantizable(), sizes=quantizable().sizes[:1])
    with pytest.raises(ConfigError, match="stored weights on torch"):
        plan_proportional(profile, [device("a")], 4096, 1)


def test_does_not_fit_says_how_much_and_what_would() -> None:
    devices = [device("a", usable_mib=450), device("b", usable_mib=450)]
    with pytest.raises(DoesNotFit) as caught:
        plan_proportional(model(8, layer_mib=100), devices, 8192, 4)
    needed = 8 * 100 * MIB + 100 * MIB + 8 * 1024 * 8192 * 4 + CPU_RESERVE_BYTES
    assert f"{needed / GIB:.2f} GiB" in caught.value.message
    assert f"{(900 * MIB + 2 * CPU_RESERVE_BYTES) / GIB:.2f} GiB" in caught.value.message
    assert "add another device" in caught.value.hint


def test_does_not_fit_names_a_context_that_would() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_proportional(model(), [device("a", usable_mib=950)], 8192, 1)
    plan_proportional(model(), [device("a", usable_mib=950)], 4096, 1)
    assert "--context 4096 would fit" in caught.value.hint
    assert "--kv-cache" not in caught.value.hint


def test_does_not_fit_names_kv_in_8_bits_where_it_would() -> None:
    devices = [device("a", usable_mib=950)]
    with pytest.raises(DoesNotFit) as caught:
        plan_proportional(model(head_dim=64), devices, 8192, 1)
    assert "--kv-cache 8-bit would fit" in caught.value.hint
    assert plan_proportional(model(head_dim=64, kv="8-bit"), devices, 8192, 1).kv == "8-bit"


@pytest.mark.parametrize(("tokens", "at_once"), [(8193, 1), (0, 1), (4096, 0)])
def test_impossible_wishes_are_config_errors(tokens: int, at_once: int) -> None:
    with pytest.raises(ConfigError):
        plan_proportional(model(), [device("a")], tokens, at_once)


def test_no_devices_do_not_fit() -> None:
    with pytest.raises(DoesNotFit):
        plan_proportional(model(), [], 4096, 1)


def test_the_id_is_of_the_work_not_of_the_prediction() -> None:
    plan = plan_proportional(model(), [device("a", gb_per_s=10), device("b", gb_per_s=10)], 4096, 1)
    faster = plan_proportional(model(), [device("a", gb_per_s=20), device("b", gb_per_s=20)], 4096, 1)
    longer = plan_proportional(model(), [device("a", gb_per_s=10), device("b", gb_per_s=10)], 8192, 1)
    assert plan.id == faster.id != longer.id


def test_rows_and_prediction() -> None:
    plan = plan_proportional(model(8, head_params=0, norm_params=0), [device("a"), device("b")], 4096, 1)
    rows = stage_rows(plan)
    assert [tuple(row[key] for key in ("stage", "device", "first", "last")) for row in rows] == [
        (0, "a", 0, 4),
        (1, "b", 4, 8),
    ]
    assert [row["share"] for row in rows] == pytest.approx([0.5, 0.5])
    weights_and_kv_s = 4 * (100 * MIB + 384 * 1024) / 10e9
    assert rows[0]["predicted_ms_per_token"] == pytest.approx(1e3 * (STEP_S + weights_and_kv_s))
    hops_s = 2 * SAME_HOST[0] + SAME_HOST[0] + 64 * 2 / SAME_HOST[1]
    assert plan.prediction.token_s == pytest.approx(2 * (STEP_S + weights_and_kv_s) + hops_s)
