"""Status reports say what a running head does, for `potluck status` and the endpoint's status route."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from msgspec import Struct

from devices.pairing.identity import fingerprint
from devices.pairing.roster import clean_text
from potluck.system.paths import logs_dir
from transport.messages.requests import Pong
from transport.messages.ring import KVForm, WeightsForm

if TYPE_CHECKING:
    from devices.pairing.pake import Candidate
    from planner.plan import Plan, StagePlan
    from potluck.head.controller import RingView
    from potluck.head.hosts import PoolHost
    from potluck.head.plan_watch import BetterPlan, Deviation
    from potluck.head.pool import PoolWorker
    from potluck.head.ring import RingStage


class StageReport(Struct, frozen=True, kw_only=True):
    """One stage. `kv_bytes` are held now, `kv_reserved_bytes` are the plan's; `ms_per_token` is the median compute of
    its last decode steps, None before the first, `predicted_ms_per_token` the plan's, for one chat. `ratio` is how
    many times slower than predicted it has been, by the steps it really ran; `is_off_s` for how long. `decode_…` and
    `prefill_…` count compute since its load. `fetched` are the bytes of weights that came for it from other hosts, by
    name, when it was last loaded, in `fetch_s`."""

    stage: int
    device: str
    host: str
    backend: str
    kind: str
    first: int
    last: int
    dtype: str
    weights_bytes: int
    kv_bytes: int
    kv_reserved_bytes: int
    kv_tokens: int
    sequences: int
    rss_bytes: int
    bandwidth_bytes_per_s: float
    ms_per_token: float | None
    predicted_ms_per_token: float
    ratio: float
    is_off_s: float | None
    decode_steps: int
    decode_tokens: int
    decode_s: float
    prefill_tokens: int
    prefill_s: float
    pid: int
    fault: str | None
    fetched: dict[str, int] = {}
    fetch_s: float = 0.0


class DeviceReport(Struct, frozen=True, kw_only=True):
    """A device of the pool that is not in the ring."""

    device: str
    backend: str
    free_bytes: int
    bandwidth_bytes_per_s: float
    reason: str


class PlanReport(Struct, frozen=True, kw_only=True):
    """What the plan promises, with matrices in the form `weights` and KV in the form `kv`: decode rates for one chat
    and for `concurrency`, the latter also with the time of their prompts (`workload_…`), and the wait for a prompt's
    first token. Rates are of tokens/s."""

    id: str
    strategy: str
    weights: WeightsForm
    kv: KVForm
    is_exact: bool
    tokens_per_s: float
    concurrency: int
    tokens_per_s_many: float
    workload_tokens_per_s: float
    prompt_tokens: int
    ttft_s: float
    limit: str


class BetterPlanReport(Struct, frozen=True, kw_only=True):
    """A plan that `potluck replan` would load, and why; rates are predicted, in tokens/s."""

    why: str
    now_tokens_per_s: float
    tokens_per_s: float
    stages: list[str]


class EngineReport(Struct, frozen=True, kw_only=True):
    """Requests, and tokens of KV on each stage: of running requests, and of those that are over, kept for prompts that
    begin alike."""

    running_requests: int
    queued_requests: int
    kv_tokens: int
    cached_kv_tokens: int


class HostReport(Struct, frozen=True, kw_only=True):
    """Another host that is connected. `potluck` is its version of the package, `pieces` where it gives pieces of
    models; its clock was `clock_off_s` ahead of the head's when it arrived."""

    name: str
    fingerprint: str
    platform: str
    potluck: str
    address: str
    is_wifi: bool
    clock_off_s: float
    pieces: str
    devices: list[str]


class WaitingReport(Struct, frozen=True, kw_only=True):
    """A host that has the code or the invite, and waits until the head's user lets it in."""

    name: str
    fingerprint: str
    platform: str
    address: str


class StatusReport(Struct, frozen=True, kw_only=True):
    """`state` is "starting", "ready" or "down"; `error` says why it is down. `lan` is where other hosts knock. `engine`
    is None while it does not answer."""

    model: str
    url: str
    lan: str | None
    state: str
    error: str | None
    hint: str | None
    pid: int
    engine_pid: int | None
    context_tokens: int
    kv_capacity_tokens: int
    engine: EngineReport | None
    plan: PlanReport | None
    better_plan: BetterPlanReport | None
    stages: list[StageReport]
    idle_devices: list[DeviceReport]
    hosts: list[HostReport] = []
    waiting: list[WaitingReport] = []
    logs: str


def plan_report(plan: Plan) -> PlanReport:
    promised = plan.prediction
    return PlanReport(
        id=plan.id,
        strategy=plan.strategy,
        weights=plan.weights,
        kv=plan.kv,
        is_exact=plan.is_exact,
        tokens_per_s=promised.tokens_per_s,
        concurrency=promised.concurrency,
        tokens_per_s_many=promised.tokens_per_s_many,
        workload_tokens_per_s=promised.workload_tokens_per_s,
        prompt_tokens=promised.prompt_tokens,
        ttft_s=promised.ttft_s,
        limit=promised.limit,
    )


def better_report(better: BetterPlan | None) -> BetterPlanReport | None:
    if better is None:
        return None
    return BetterPlanReport(
        why=better.why,
        now_tokens_per_s=better.now_tokens_per_s,
        tokens_per_s=better.tokens_per_s,
        stages=[f"{stage.device}: layers {stage.first}–{stage.last - 1}" for stage in better.plan.stages],
    )


def stage_report(stage: RingStage, planned: StagePlan, deviation: Deviation | None) -> StageReport:
    worker, register = stage.worker, stage.worker.register
    stats, loaded = worker.stats, worker.loaded
    return StageReport(
        stage=stage.index,
        device=register.device,
        host=register.host,
        backend=register.backend,
        kind=register.kind,
        first=stage.first,
        last=stage.last,
        dtype=planned.compute_dtype,
        weights_bytes=loaded.weights_bytes if loaded else 0,
        kv_bytes=stats.kv_bytes if stats else 0,
        kv_reserved_bytes=planned.kv_bytes,
        kv_tokens=stats.kv_tokens if stats else 0,
        sequences=stats.sequences if stats else 0,
        rss_bytes=stats.rss_bytes if stats else 0,
        bandwidth_bytes_per_s=register.bandwidth_bytes_per_s,
        decode_steps=stats.decode_steps if stats else 0,
        decode_tokens=stats.decode_tokens if stats else 0,
        decode_s=stats.decode_s if stats else 0.0,
        prefill_tokens=stats.prefill_tokens if stats else 0,
        prefill_s=stats.prefill_s if stats else 0.0,
        ms_per_token=stats.decode_p50_s * 1000 if stats and stats.decode_steps else None,
        predicted_ms_per_token=planned.decode_s * 1000,
        ratio=deviation.ratio if deviation is not None else 1.0,
        is_off_s=time.time() - deviation.since_s if deviation is not None and deviation.since_s is not None else None,
        pid=register.pid,
        fault=worker.fault.message if worker.fault else None,
        fetched=loaded.fetched if loaded else {},
        fetch_s=loaded.fetch_s if loaded else 0.0,
    )


def engine_report(pong: Pong | None) -> EngineReport | None:
    if pong is None:
        return None
    return EngineReport(
        running_requests=max(0, pong.active_requests - pong.queued_requests),
        queued_requests=pong.queued_requests,
        kv_tokens=pong.kv_tokens,
        cached_kv_tokens=pong.cached_kv_tokens,
    )


def report_of(
    view: RingView,
    pong: Pong | None,
    *,
    model: str,
    url: str,
    lan: str | None,
    workers: list[PoolWorker],
    hosts: list[PoolHost],
    candidates: tuple[Candidate, ...],
) -> StatusReport:
    ring = view.ring
    stages = ring.stages if ring is not None else ()
    watch = view.watch if ring is not None else None
    used = {stage.worker.register.device for stage in stages}
    reasons = {device.name: device.reason for device in ring.plan.left_out} if ring is not None else {}
    return StatusReport(
        model=model,
        url=url,
        lan=lan,
        state=view.phase,
        error=view.error.message if view.error is not None else None,
        hint=(view.error.hint or None) if view.error is not None else None,
        pid=os.getpid(),
        engine_pid=view.engine_pid,
        context_tokens=ring.plan.context_tokens if ring is not None else 0,
        kv_capacity_tokens=ring.plan.kv_capacity_tokens if ring is not None else 0,
        engine=engine_report(pong),
        plan=plan_report(ring.plan) if ring is not None else None,
        better_plan=better_report(watch.better) if watch is not None else None,
        stages=[
            stage_report(stage, ring.plan.stages[stage.index], watch.deviations[stage.index] if watch else None)
            for stage in stages
            if ring
        ],
        idle_devices=[
            DeviceReport(
                device=worker.register.device,
                backend=worker.register.backend,
                free_bytes=worker.register.free_bytes,
                bandwidth_bytes_per_s=worker.register.bandwidth_bytes_per_s,
                reason=reasons.get(worker.register.device, "joined after the ring was loaded"),
            )
            for worker in workers
            if worker.register.device not in used
        ],
        hosts=[_host_report(host, workers) for host in hosts],
        waiting=[_waiting_report(candidate) for candidate in candidates],
        logs=str(logs_dir()),
    )


def _waiting_report(candidate: Candidate) -> WaitingReport:
    return WaitingReport(
        name=candidate.name,
        fingerprint=fingerprint(candidate.key),
        platform=clean_text(candidate.platform),
        address=candidate.address,
    )


def _host_report(host: PoolHost, workers: list[PoolWorker]) -> HostReport:
    return HostReport(
        name=host.name,
        fingerprint=fingerprint(host.key),
        platform=clean_text(host.hello.platform),
        potluck=clean_text(host.hello.potluck),
        address=clean_text(host.hello.address),
        is_wifi=host.hello.is_wifi,
        clock_off_s=host.hello.clock_s - host.connected_s,
        pieces=host.hello.pieces,
        devices=[worker.register.device for worker in workers if worker.peer.key == host.key],
    )
