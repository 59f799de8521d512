"""The load report shows results as a table, as Markdown, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transport.errors import ConfigError

_PERCENTILES = ("p50", "p95", "p99")
_Column = tuple[str, str, list[str]]


def text(result: Mapping[str, Any]) -> str:
    """Aligned columns under two lines of headings, and what needs more than a column below."""
    columns = _columns(result)
    widths = [max(map(len, (top, bottom, *values))) for top, bottom, values in columns]
    rows = [[top for top, _, _ in columns], [bottom for _, bottom, _ in columns]]
    rows += [[values[index] for _, _, values in columns] for index in range(len(result["rows"]))]
    lines = [_title(result), ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_notes(result)]) + "\n"


def markdown(result: Mapping[str, Any]) -> str:
    columns = _columns(result)
    headings = [f"{top} {bottom}".strip() for top, bottom, _ in columns]
    rows = [[values[index] for _, _, values in columns] for index in range(len(result["rows"]))]
    return "\n".join([_title(result), "", *markdown_table(headings, rows), *_notes(result)]) + "\n"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _title(result: Mapping[str, Any]) -> str:
    mix = result["mix"]
    prompts = " or ".join(
        f"{tokens}" if len(mix["lengths"]) == 1 or weight == 1 else f"{tokens} (×{weight:g})"
        for tokens, weight in mix["lengths"]
    )
    chat = f"prompts of {prompts}, answers of {mix['output']} tokens"
    if mix["shared_prefix"]:
        chat += f", the first {mix['shared_prefix']} shared"
    if mix["turns"] > 1:
        chat += f", {mix['turns']} turns a chat"
    # A server of a file may call its model by the file's path.
    models = ", ".join(dict.fromkeys(each["model"].rsplit("/", 1)[-1] for each in result["endpoints"]))
    rounds = f", {result['rounds']} rounds" if result["rounds"] > 1 else ""
    return (
        f"{models}: {chat}{rounds}; {result['processor']} ({result['cores']} cores), {result['date']}, "
        f"commit {result['commit']}"
    )


def _columns(result: Mapping[str, Any]) -> list[_Column]:
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    several = len(result["endpoints"]) > 1
    columns: list[_Column] = []
    if several:
        columns.append(("endpoint", "", [_short(row["endpoint"]) for row in rows]))
    columns.append(("load", "", [row["load"] for row in rows]))
    columns.append(("tokens/s", "", [_number(row["tokens_per_s"]) for row in rows]))
    if several:
        columns.append(("× first", "", [_ratio(row) for row in rows]))
    columns.append(("requests", "/s", [f"{row['requests_per_s']:.2f}" for row in rows]))
    columns += [
        ("first token s", "p50/p95/p99", [_spread(row, "ttft_s", 1.0) for row in rows]),
        ("inter-token ms", "p50/p95/p99", [_spread(row, "inter_token_s", 1e3) for row in rows]),
        ("whole answer s", "p50/p95/p99", [_spread(row, "latency_s", 1.0) for row in rows]),
        ("done", "", [str(row["done"]) for row in rows]),
    ]
    if any(_not_done(row) for row in rows):
        columns.append(("not", "done", [_not_done(row) or "–" for row in rows]))
    columns.append(
        ("tokens", "in+out", [f"{_count(row['prompt_tokens'])}+{_count(row['output_tokens'])}" for row in rows])
    )
    if any(row["cached_share"] is not None for row in rows):
        columns.append(("cached", "%", [_percent(row["cached_share"]) for row in rows]))
    if any(row["stages"] for row in rows):
        idle = [" ".join(f"{100 * stage['idle']:.0f}" for stage in row["stages"]) or "–" for row in rows]
        columns.append(("stages", "idle %", idle))
    return columns


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = [""]
    for row in result["rows"]:
        where = f"{_short(row['endpoint'])}, {row['load']}" if len(result["endpoints"]) > 1 else row["load"]
        for kind in ("prompt", "turn"):
            for part in row[f"by_{kind}"]:
                cached = part["cached_tokens"]
                length = _count(part["prompt_tokens"])
                tail = f", {cached:.0f} of {length} tokens cached" if cached is not None else ""
                name = f"turn {part[kind]} ({length} tokens)" if kind == "turn" else f"prompts of {part[kind]} tokens"
                notes.append(f"{where}: {name}: first token {_spread(part, 'ttft_s', 1.0)} s{tail}")
        if not any(row[end] for end in ("done", "failed", "refused_429", "refused_503", "unfinished")):
            notes.append(f"{where}: no request began after the warm-up: take a longer --duration, a shorter --warm-up")
        notes += [f"{where}: {count} × {reason}" for reason, count in row["reasons"].items()]
    if any(row["unfinished"] for row in result["rows"]):
        notes.append("≥: requests without an answer when the load ended count with the time they had waited")
    if any(row["tokens_counted_by"] == "events" and row["done"] for row in result["rows"]):
        notes.append("An endpoint gives no usage: what is counted there are the stream's events")
    tokens_us = [row["client_cpu_us_per_token"] for row in result["rows"] if row["client_cpu_us_per_token"] is not None]
    if tokens_us:
        notes.append(
            f"The client itself took {max(tokens_us):.0f} µs of CPU a token" + " at most" * (len(tokens_us) > 1)
        )
    if result["is_interrupted"]:
        notes.append("Interrupted: this is what was measured until then")
    return notes if len(notes) > 1 else []


def _spread(row: Mapping[str, Any], name: str, unit: float) -> str:
    values = [row[name][percentile] for percentile in _PERCENTILES]
    if None in values:
        return "–"
    # In milliseconds one digit says enough, in seconds two or three.
    shown = "/".join(_number(unit * value) if unit > 1 else _seconds(value) for value in values)
    return f"≥{shown}" if row.get("unfinished") and name in ("ttft_s", "latency_s") else shown


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


def _short(url: str) -> str:
    return url.partition("://")[2] or url


def _ratio(row: Mapping[str, Any]) -> str:
    ratio = (row.get("ratio") or {}).get("tokens_per_s")
    return "–" if ratio is None else f"{ratio:.2f}"


def _not_done(row: Mapping[str, Any]) -> str:
    names = (("failed", "failed"), ("refused_429", "× 429"), ("refused_503", "× 503"), ("unfinished", "unfinished"))
    return ", ".join(f"{row[key]} {name}" for key, name in names if row[key])


def new_figure(width: float, height: float) -> Any:
    """Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", hint="pip install 'potluck[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Tokens/s and the median wait for the first token, over the load. Raises ConfigError without matplotlib."""
    figure = new_figure(7, 6)
    rates, waits = figure.subplots(2, sharex=True)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in result["rows"]:
        name = f"{row['endpoint']}, {'clients' if row['clients'] else 'requests/s'}"
        point = (row["clients"] or row["rate_per_s"], row["tokens_per_s"], row["ttft_s"]["p50"] or float("nan"))
        lines.setdefault(name, []).append(point)
    for name, points in lines.items():
        loads, tokens, ttft = zip(*sorted(points), strict=True)
        rates.plot(loads, tokens, marker="o", label=name)
        waits.plot(loads, ttft, marker="o")
    rates.set_ylabel("tokens/s")
    rates.set_ylim(bottom=0)
    rates.legend(fontsize="small")
    waits.set_ylabel("first token, p50, s")
    waits.set_ylim(bottom=0)
    waits.set_xlabel("clients, or requests that come a second")
    figure.savefig(file)
