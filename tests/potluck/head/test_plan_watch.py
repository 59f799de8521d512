"""A plan that turns out wrong in use is noticed, and a better one is found with the times as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from devices.hardware.device import Device
from planner.measurements import estimated_pool
from planner.memory import ModelProfile
from potluck.head.plan_watch import PlanWatch
from potluck.head.planning import plan_for, profile_of
from potluck.store.store import Store
from potluck.system.settings import Settings
from tests.support.demo_model import models_home
from transport.messages.control import DecodeBucket, Stats


def device(name: str, bandwidth: float) -> Device:
    return Device(
        name=name,
        backend="torch",
        kind="cpu",
        host=name,
        threads=1,
        free_bytes=2**34,
        total_bytes=2**34,
        bandwidth_bytes_per_s=bandwidth,
        compute_dtype="bfloat16",
        memory_pool=name,
    )


def stats(token: int, steps: int, seconds: float) -> Stats:
    bucket = DecodeBucket(largest_rows=1, steps=steps, rows=steps, context_tokens=steps * 384, seconds=seconds)
    return Stats(token=token, rss_bytes=0, decode_buckets=(bucket,))


def watch_of(slow: Sequence[float], smollm2_path: object) -> tuple[PlanWatch, ModelProfile]:
    model = Store(models_home()).show("smollm2")
    settings = Settings(objective="latency", use_all=True, concurrency=1)
    times = estimated_pool(profile_of(model), [device("a", 1e10), device("b", 1e10)], "a")
    plan = plan_for(model, times, settings)
    watch = PlanWatch(model, times, plan, settings)
    for look in range(60):
        found = [
            stats(look, 100 * (look + 1), 100 * (look + 1) * stage.decode_s * factor)
            for stage, factor in zip(plan.stages, slow, strict=True)
        ]
        watch.update(found, 1000.0 + 5.0 * look)
    return watch, profile_of(model)


def test_a_plan_that_holds_is_left_alone(smollm2_path: object) -> None:
    watch, _ = watch_of([1.0, 1.1], smollm2_path)
    assert watch.better is None
    assert not watch.deviating(2000.0)


def test_a_device_that_slows_down_for_good_gets_less_to_do(smollm2_path: object) -> None:
    watch, _ = watch_of([1.0, 3.0], smollm2_path)
    slow = watch.plan.stages[1]
    assert watch.deviating(2000.0).keys() == {slow.device}
    assert watch.better is not None
    then = {stage.device: stage.num_layers for stage in watch.better.plan.stages}
    assert then[slow.device] < slow.num_layers
    assert watch.better.tokens_per_s > 1.05 * watch.better.now_tokens_per_s
    assert slow.device in watch.better.why


def test_layers_set_by_hand_are_the_users_to_change(smollm2_path: object) -> None:
    model = Store(models_home()).show("smollm2")
    settings = Settings(layers="a=15,b=15", concurrency=1)
    times = estimated_pool(profile_of(model), [device("a", 1e10), device("b", 1e10)], "a")
    plan = plan_for(model, times, settings)
    watch = PlanWatch(model, replace(times), plan, settings)
    for look in range(60):
        watch.update(
            [stats(look, 100 * (look + 1), 300 * (look + 1) * stage.decode_s) for stage in plan.stages],
            1000.0 + 5.0 * look,
        )
    assert watch.deviating(2000.0)
    assert watch.better is None
