"""Summaries turn requests and stages' counters into rates, percentiles and shares."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from planner.memory import ModelProfile
from potluck.measure.endpoint import StreamedAnswer, answer_of
from potluck.measure.load_run import LoadCell, LoadOutcome, LoadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """Shares of the time. `idle`: other stages computed, or nobody did; `wire` is the ring's, the same for all its
    stages: hops, the engine and HTTP. It can be told from idling for one chat only, when nothing overlaps.
    `decode_step_s` is the mean decode step, and `ratio` how many times slower than planned such steps have been."""

    device: str
    first: int
    last: int
    compute: float
    wire: float | None
    idle: float
    decode_step_s: float
    ratio: float


def stage_use_between(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], wall_s: float, *, concurrency: int
) -> list[StageUse]:
    """`before` and `after` are the stages of two status reports of the same ring."""
    compute = [
        (new["decode_s"] + new["prefill_s"] - old["decode_s"] - old["prefill_s"]) / wall_s
        for old, new in zip(before, after, strict=True)
    ]
    wire = max(0.0, 1.0 - sum(compute)) if concurrency == 1 else None
    return [
        StageUse(
            device=new["device"],
            first=new["first"],
            last=new["last"],
            compute=share,
            wire=wire,
            idle=max(0.0, 1.0 - share - (wire or 0.0)),
            decode_step_s=_decode_step_s(old, new),
            ratio=new["ratio"],
        )
        for old, new, share in zip(before, after, compute, strict=True)
    ]


def _decode_step_s(old: dict[str, Any], new: dict[str, Any]) -> float:
    steps = new["decode_steps"] - old["decode_steps"]
    return float((new["decode_s"] - old["decode_s"]) / steps) if steps else 0.0


def bandwidth_bound_tokens_per_s(profile: ModelProfile, stages: Sequence[dict[str, Any]], concurrency: int) -> float:
    """What reading the weights allows at the devices' measured bandwidths: no hops, no KV, no arithmetic.

    A device's bandwidth is that while its host's other devices work too: one chat in a ring over several devices of one
    host can go beyond it. One chat visits the stages one after another; many go in as many groups as there are stages,
    and a step reads a stage's weights once for its whole group.
    """
    times_s = [_read_s(profile, stage) for stage in stages]
    group = -(-concurrency // min(concurrency, len(stages)))
    return min(concurrency / sum(times_s), group / max(times_s))


def _read_s(profile: ModelProfile, stage: dict[str, Any]) -> float:
    read_bytes = profile.work_bytes(stage["first"], stage["last"], stage["backend"], stage["dtype"])
    return float(read_bytes / stage["bandwidth_bytes_per_s"])


_SHOWN_REASONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRequest:
    """A request as its client saw it. Times are from when it was due, so that waiting behind others counts also where
    the client waited with sending. `ttft_s` and `latency_s` of an unfinished one are how long it had waited when it was
    left: at least that."""

    end: Literal["done", "failed", "refused", "unfinished"]
    tokens_asked: int
    turn: int
    ttft_s: float
    latency_s: float
    late_s: float
    answer: StreamedAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One round of one cell: what was seen of the measured requests, and what came in the window, `window_s` long, of
    all requests."""

    window_s: float
    tokens: int
    answers: int
    requests: tuple[ObservedRequest, ...]
    cpu_s: float
    stages: tuple[StageUse, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.window_s

    @property
    def requests_per_s(self) -> float:
        return self.answers / self.window_s


def trial_of(outcome: LoadOutcome, cell: LoadCell) -> Trial | None:
    """None where the window had no time."""
    window_s = outcome.end_s - outcome.begin_s
    if window_s <= 0:
        return None
    seen = [(request, _observe(request, outcome.cut_s)) for request in outcome.requests]
    tokens = sum(
        arrival.tokens
        for _, each in seen
        for arrival in each.answer.arrivals
        if outcome.begin_s <= arrival.at_s < outcome.end_s
    )
    return Trial(
        window_s=window_s,
        tokens=tokens,
        answers=sum(
            each.end == "done" and outcome.begin_s <= request.exchange.ended_s <= outcome.end_s
            for request, each in seen
        ),
        requests=tuple(each for request, each in seen if request.is_measured),
        cpu_s=outcome.cpu_s,
        stages=tuple(_stages(outcome, cell)),
    )


def _observe(request: LoadRequest, cut_s: float) -> ObservedRequest:
    exchange = request.exchange
    answer = answer_of(exchange)
    end: Literal["done", "failed", "refused", "unfinished"] = "done"
    if request.is_refused:
        end = "refused"
    elif not exchange.reader.is_done and not exchange.error:
        end = "unfinished"
    elif answer.error:
        end = "failed"
    left_s = cut_s - request.scheduled_s
    return ObservedRequest(
        end=end,
        tokens_asked=request.tokens,
        turn=request.turn,
        ttft_s=answer.arrivals[0].at_s - request.scheduled_s if answer.arrivals else left_s,
        latency_s=left_s if end == "unfinished" else exchange.ended_s - request.scheduled_s,
        late_s=max(0.0, (exchange.started_s or cut_s) - request.scheduled_s),
        answer=answer,
    )


def _stages(outcome: LoadOutcome, cell: LoadCell) -> list[StageUse]:
    """Of a Potluck head, if it was the same ring at both ends."""
    if len(outcome.statuses) < 2:
        return []
    (begin_s, before), (end_s, after) = outcome.statuses
    same = [[(each["device"], each["first"]) for each in status["stages"]] for status in (before, after)]
    if same[0] != same[1] or end_s <= begin_s:
        return []
    # Of many chats it can't be told whether a stage waits for others or for the wire; nor of those that come by chance.
    return stage_use_between(before["stages"], after["stages"], end_s - begin_s, concurrency=cell.clients or 2)


def decode_tokens_per_s(arrivals: Sequence[Sequence[float]], tokens: int) -> float:
    """Of streams with `tokens` in all, whose text came at these seconds: from the last one's first token to the first
    one's last. 0 if they never decoded at the same time."""
    if len(arrivals) == 1:
        seconds = arrivals[0][-1] - arrivals[0][0]
        return (tokens - 1) / seconds if seconds > 0 else 0.0
    begin, end = max(stream[0] for stream in arrivals), min(stream[-1] for stream in arrivals)
    if end <= begin:
        return 0.0
    # An arrival can hold more than one token.
    per_arrival = tokens / sum(map(len, arrivals))
    return per_arrival * sum(begin < at <= end for stream in arrivals for at in stream) / (end - begin)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of them don't exceed; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread(values: Iterable[float]) -> dict[str, float | None]:
    found = list(values)
    return {
        "p50": percentile(found, 50),
        "p95": percentile(found, 95),
        "p99": percentile(found, 99),
        "max": max(found, default=None),
        "mean": statistics.fmean(found) if found else None,
    }


def row_of(endpoint: str, cell: LoadCell, trials: Sequence[Trial], first: Sequence[Trial] | None) -> dict[str, Any]:
    """A cell at an endpoint over its rounds, which `first` has of the endpoint that it is compared with, if any.

    Rates are medians over rounds, percentiles are over all rounds' requests together."""
    seen = [each for trial in trials for each in trial.requests]
    ended = Counter(each.end for each in seen)
    refused = Counter(each.answer.status for each in seen if each.end == "refused")
    done = [each for each in seen if each.end == "done"]
    waited = [each for each in seen if each.end in ("done", "unfinished")]
    answers = [each.answer for each in waited]
    tokens = sum(trial.tokens for trial in trials)
    cpu_s = sum(trial.cpu_s for trial in trials)
    prompts = [each.answer.prompt_tokens for each in done if each.answer.prompt_tokens is not None]
    cached = [each.answer.cached_tokens for each in done if each.answer.cached_tokens is not None]
    rates = [trial.tokens_per_s for trial in trials]
    row = {
        "endpoint": endpoint,
        "load": str(cell),
        "clients": cell.clients,
        "rate_per_s": cell.rate_per_s,
        "window_s": sum(trial.window_s for trial in trials),
        "done": ended["done"],
        "failed": ended["failed"],
        "refused_429": refused[429],
        "refused_503": refused[503],
        "unfinished": ended["unfinished"],
        "reasons": _reasons(seen),
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_min_max": (min(rates), max(rates)),
        "requests_per_s": statistics.median(trial.requests_per_s for trial in trials),
        "ttft_s": spread(each.ttft_s for each in waited),
        "inter_token_s": spread(gap for answer in answers for gap in answer.gaps_s),
        "pause_s": spread(pause for answer in answers for pause in answer.pauses_s),
        "latency_s": spread(each.latency_s for each in waited),
        "sent_late_s": spread(each.late_s for each in waited),
        "prompt_tokens": statistics.fmean(prompts) if prompts else None,
        "output_tokens": statistics.fmean(each.answer.tokens for each in done) if done else None,
        "tokens_counted_by": "usage" if all(each.answer.has_usage for each in done) else "events",
        "cached_tokens": sum(cached) if cached else None,
        "cached_share": sum(cached) / sum(prompts) if cached and sum(prompts) else None,
        "by_prompt": _parts(waited, lambda each: each.tokens_asked, "prompt"),
        "by_turn": _parts(waited, lambda each: each.turn + 1, "turn"),
        "stages": _mean_uses(trials),
        "client_cpu_s": cpu_s,
        "client_cpu_us_per_token": 1e6 * cpu_s / tokens if tokens else None,
        "rounds": [
            {
                "tokens_per_s": trial.tokens_per_s,
                "requests_per_s": trial.requests_per_s,
                "ttft_p50_s": _ttft(trial),
                "inter_token_p50_s": _gap(trial),
            }
            for trial in trials
        ],
    }
    if first is not None:
        row["ratio"] = {
            "tokens_per_s": _ratio(trials, first, lambda trial: trial.tokens_per_s),
            "ttft_p50": _ratio(trials, first, _ttft),
            "inter_token_p50": _ratio(trials, first, _gap),
        }
    return row


def _reasons(seen: Iterable[ObservedRequest]) -> dict[str, int]:
    return dict(
        Counter(each.answer.error for each in seen if each.end in ("failed", "refused")).most_common(_SHOWN_REASONS)
    )


def _parts(seen: Sequence[ObservedRequest], key: Callable[[ObservedRequest], int], name: str) -> list[dict[str, Any]]:
    """Where chats differ in it: how long each kind waited for its first token, and how much of it was cached."""
    kinds = sorted({key(each) for each in seen})
    if len(kinds) < 2:
        return []
    parts = []
    for kind in kinds:
        of_kind = [each for each in seen if key(each) == kind]
        cached = [each.answer.cached_tokens for each in of_kind if each.answer.cached_tokens is not None]
        prompts = [each.answer.prompt_tokens for each in of_kind if each.answer.prompt_tokens is not None]
        parts.append(
            {
                name: kind,
                "requests": len(of_kind),
                "prompt_tokens": statistics.fmean(prompts) if prompts else None,
                "cached_tokens": statistics.fmean(cached) if cached else None,
                "ttft_s": spread(each.ttft_s for each in of_kind),
                "latency_s": spread(each.latency_s for each in of_kind),
            }
        )
    return parts


def _mean_uses(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Of the last round's stages, with shares averaged over the rounds that had the same ones."""
    last = trials[-1].stages
    same = [trial.stages for trial in trials if [use.first for use in trial.stages] == [use.first for use in last]]
    return [
        {
            **asdict(use),
            "compute": statistics.fmean(stages[index].compute for stages in same),
            "idle": statistics.fmean(stages[index].idle for stages in same),
        }
        for index, use in enumerate(last)
    ]


def _ttft(trial: Trial) -> float | None:
    return percentile([each.ttft_s for each in trial.requests if each.end in ("done", "unfinished")], 50)


def _gap(trial: Trial) -> float | None:
    return percentile([gap for each in trial.requests if each.end == "done" for gap in each.answer.gaps_s], 50)


def _ratio(trials: Sequence[Trial], first: Sequence[Trial], value: Callable[[Trial], float | None]) -> float | None:
    """The median over rounds of one by the other."""
    pairs = [(value(ours), value(theirs)) for ours, theirs in zip(trials, first, strict=False)]
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
    return statistics.median(ratios) if ratios else None
