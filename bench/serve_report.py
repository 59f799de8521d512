"""Results of `bench.serve` for people: a Markdown table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transport.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One ring (or one device alone) in one cell; medians over rounds.

    `tokens_per_s` counts the prompts' time, `decode_tokens_per_s` does not. `gap_…_s` are between tokens of one chat.
    `bound_tokens_per_s` is what reading the weights alone allows.
    """

    ring: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    tokens_per_s: float
    decode_tokens_per_s: float
    decode_min_max: tuple[float, float]
    ttft_s: float
    gap_p50_s: float
    gap_p95_s: float
    gap_p99_s: float
    predicted_tokens_per_s: float | None
    bound_tokens_per_s: float
    stages: list[dict[str, Any]]


_HEADINGS = (
    "ring",
    "prompt + output",
    "chats",
    "tokens/s",
    "with prompts",
    "predicted",
    "error",
    "of bound",
    "TTFT s",
    "gap p50/p95/p99 ms",
    "stages: compute/wire/idle %",
)


def markdown(result: Mapping[str, Any]) -> str:
    """A table of the rows, with what they were measured on."""
    lines = [
        f"{result['model']} on {result['processor']} ({result['cores']} cores), {result['date']}, "
        f"commit {result['commit']}, medians of {result['rounds']}",
        "",
        f"| {' | '.join(_HEADINGS)} |",
        f"|{'---|' * len(_HEADINGS)}",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result["rows"]]
    left_out = result.get("left_out") or {}
    if left_out:
        lines += ["", *(f"Not measured alone: {name}: {reason}" for name, reason in left_out.items())]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    measured, predicted = row["decode_tokens_per_s"], row["predicted_tokens_per_s"]
    return (
        row["ring"],
        f"{row['prompt_tokens']} + {row['output_tokens']}",
        str(row["concurrency"]),
        f"{measured:.1f}",
        f"{row['tokens_per_s']:.1f}",
        f"{predicted:.1f}" if predicted else "–",
        f"{100 * (predicted / measured - 1):+.0f} %" if predicted and measured else "–",
        f"{100 * measured / row['bound_tokens_per_s']:.0f} %",
        f"{row['ttft_s']:.2f}",
        "/".join(f"{1e3 * row[f'gap_{name}_s']:.1f}" for name in ("p50", "p95", "p99")),
        ", ".join(_use(stage) for stage in row["stages"]),
    )


def _use(stage: Mapping[str, Any]) -> str:
    wire = "–" if stage["wire"] is None else f"{100 * stage['wire']:.0f}"
    return f"{stage['device']} {100 * stage['compute']:.0f}/{wire}/{100 * stage['idle']:.0f}"


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Tokens per second over concurrency, a line for each ring and length. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", hint="pip install 'potluck[plots]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in result["rows"]:
        name = f"{row['ring']}, {row['prompt_tokens']} + {row['output_tokens']} tokens"
        point = (row["concurrency"], row["decode_tokens_per_s"], row["bound_tokens_per_s"])
        lines.setdefault(name, []).append(point)
    for name, points in sorted(lines.items()):
        chats, rates, bounds = zip(*sorted(points), strict=True)
        (drawn,) = axes.plot(chats, rates, marker="o", label=name)
        axes.plot(chats, bounds, linestyle=":", color=drawn.get_color())
    axes.set_xlabel("chats at once")
    axes.set_ylabel("tokens/s (dotted: bound by reading the weights)")
    axes.set_title(f"{result['model']}, {result['commit']}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(file)
