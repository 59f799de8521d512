"""What a ring delivers: prompt × output × concurrency against a running head, or against one that this starts.

potluck bench [MODEL] [--prompt 32 256] [--output 64] [--concurrency 1 4] [--rounds 3] [--singles]
              [--json FILE] [--markdown FILE] [--plot FILE] [-- OPTIONS OF potluck up]

Without MODEL, the head that runs on this host is measured as it is. With it, a head is started with the options after
"--" (devices, --wait-for and so on) and stopped at the end; `--singles` then also measures each of its devices alone.
Cells are run in turns, round after round, because machines drift; values are medians over rounds.

Two more benches have options of their own: potluck bench --serve --help (load over time, also on other endpoints than
Potluck's), potluck bench --hops --help (the software cost of a hop).
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from potluck.head.planning import profile_of
from potluck.host.local_head import running_head
from potluck.measure.chats import ChatLoad, ChatTimings
from potluck.measure.head_process import CommandProcess, status_of
from potluck.measure.result import hardware_facts
from potluck.measure.summary import StageUse, bandwidth_bound_tokens_per_s, stage_use_between
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.paths import home_dir
from transport.errors import ConfigError, PotluckError


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRow:
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


_UP_WITHIN_S = 3600.0
_WARM_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GridCell:
    """`concurrency` chats at once, each of `prompt` and `output` tokens."""

    prompt: int
    output: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class _Round:
    times: ChatTimings
    uses: list[StageUse]


def measure_head(url: str, model: StoredModel, cells: Sequence[GridCell], rounds: int, *, name: str) -> list[GridRow]:
    """One row a cell. Raises RuntimeError if the head fails a chat."""
    load = ChatLoad(url, model.name, model.path)
    for count in sorted({cell.concurrency for cell in cells}):
        load.run(_WARM_TOKENS, _WARM_TOKENS, count)
    found: dict[GridCell, list[_Round]] = {cell: [] for cell in cells}
    for number in range(rounds):
        for cell in cells:
            _say(f"{name}, round {number + 1} of {rounds}: {cell.concurrency} × {cell.prompt} + {cell.output} tokens")
            before = status_of(url)
            started = time.perf_counter()
            times = load.run(cell.prompt, cell.output, cell.concurrency)
            wall_s = time.perf_counter() - started
            after = status_of(url)
            uses = stage_use_between(before["stages"], after["stages"], wall_s, concurrency=cell.concurrency)
            found[cell].append(_Round(times, uses))
    status = status_of(url)
    return [_row(name, cell, of_cell, model, status) for cell, of_cell in found.items()]


def _row(name: str, cell: GridCell, rounds: Sequence[_Round], model: StoredModel, status: dict[str, Any]) -> GridRow:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    decode = median([_decode_rate(each.times, cell) for each in rounds])
    profile = profile_of(model, status["plan"]["weights"])
    bound = bandwidth_bound_tokens_per_s(profile, status["stages"], cell.concurrency)
    predicted = _predicted(status, cell)
    return GridRow(
        ring=name,
        prompt_tokens=rounds[0].times.chats[0].prompt_tokens,
        output_tokens=cell.output,
        concurrency=cell.concurrency,
        tokens_per_s=median([each.times.tokens_per_s for each in rounds]),
        decode_tokens_per_s=decode,
        decode_min_max=(
            min(_decode_rate(each.times, cell) for each in rounds),
            max(_decode_rate(each.times, cell) for each in rounds),
        ),
        ttft_s=median([each.times.ttft_s for each in rounds]),
        gap_p50_s=median([each.times.gap_percentile_s(50) for each in rounds]),
        gap_p95_s=median([each.times.gap_percentile_s(95) for each in rounds]),
        gap_p99_s=median([each.times.gap_percentile_s(99) for each in rounds]),
        predicted_tokens_per_s=predicted,
        bound_tokens_per_s=bound,
        stages=[asdict(use) for use in rounds[-1].uses],
    )


def _decode_rate(times: ChatTimings, cell: GridCell) -> float:
    return times.chats[0].decode_tokens_per_s if cell.concurrency == 1 else times.decode_tokens_per_s


def _predicted(status: dict[str, Any], cell: GridCell) -> float | None:
    """The plan's promise for one chat or for as many as it was made for; whatever their lengths."""
    plan = status.get("plan")
    if not plan:
        return None
    if cell.concurrency == 1:
        return float(plan["tokens_per_s"])
    return float(plan["tokens_per_s_many"]) if cell.concurrency == plan["concurrency"] else None


def measure_running(cells: Sequence[GridCell], rounds: int) -> dict[str, Any]:
    """The head of this host. Raises NotRunning."""
    head = running_head()
    model = Store(home_dir()).show(head.model)
    rows = measure_head(head.url, model, cells, rounds, name="ring")
    return {"model": model.name, "rows": [asdict(row) for row in rows], "status": status_of(head.url)}


def measure_started(
    name: str, options: Sequence[str], cells: Sequence[GridCell], rounds: int, *, singles: bool
) -> dict[str, Any]:
    """A head of its own, and then, one after another, each of its devices alone."""
    model = Store(home_dir()).resolve(name)
    rings: list[tuple[str, list[str]]] = [("ring", [])]
    rows: list[GridRow] = []
    left_out: dict[str, str] = {}
    status: dict[str, Any] = {}
    while rings:
        ring, layers = rings.pop(0)
        _say(f"starting {ring}")
        with ExitStack() as stack:
            head = CommandProcess(["up", name, "--port", "0", *options, *layers, "--json"])
            stack.callback(head.stop)
            try:
                url = head.wait_for_facts(_UP_WITHIN_S)["url"]
            except RuntimeError as error:
                if not layers:
                    raise
                left_out[ring] = str(error)
                continue
            rows += measure_head(url, model, cells, rounds, name=ring)
            if not layers:
                status = status_of(url)
                if singles and len(status["stages"]) + len(status["idle_devices"]) > 1:
                    devices = [each["device"] for each in (*status["stages"], *status["idle_devices"])]
                    rings += [(device, ["--layers", f"{device}={model.spec.num_layers}"]) for device in devices]
    return {"model": model.name, "rows": [asdict(row) for row in rows], "left_out": left_out, "status": status}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="potluck bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=None, help="start a head with it; default: measure the running one")
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 256], help="tokens of a prompt")
    parser.add_argument("--output", type=int, nargs="+", default=[64], help="tokens of an answer")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4], help="chats at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--singles", action="store_true", help="each device alone too, also where it wins")
    parser.add_argument("--json", type=Path, default=None, help="write the result to this file, and not to stdout")
    parser.add_argument("--markdown", type=Path, default=None, help="write a table to this file")
    parser.add_argument("--plot", type=Path, default=None, help="draw to this file (.png, .svg); needs potluck[plots]")
    options = parser.parse_args(list(arguments[:at]))
    for name in ("prompt", "output", "concurrency"):
        if min(getattr(options, name)) < (2 if name == "output" else 1):
            parser.error(f"--{name} is too small")
    up_options = list(arguments[at + 1 :])
    if options.model is None and (options.singles or up_options):
        parser.error("--singles and options after -- are for a head that is started: name a MODEL")
    return options, up_options


def main(arguments: Sequence[str] | None = None) -> int:
    options, up_options = _options(sys.argv[1:] if arguments is None else arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # stop the head in any case
    cells = [
        GridCell(prompt=prompt, output=output, concurrency=concurrency)
        for concurrency in options.concurrency
        for prompt in options.prompt
        for output in options.output
    ]
    try:
        if options.model is None:
            found = measure_running(cells, options.rounds)
        else:
            found = measure_started(options.model, up_options, cells, options.rounds, singles=options.singles)
        result = {**hardware_facts(), "options": up_options, "rounds": options.rounds, **found}
        table = markdown(result)
        if options.markdown is not None:
            options.markdown.write_text(table)
        if options.plot is not None:
            plot(result, options.plot)
    except PotluckError as error:
        _say(f"error: {error}")
        return 1
    except (RuntimeError, httpx.HTTPError, subprocess.SubprocessError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
        print(table, end="")
    else:
        print(json.dumps(result, indent=2))
    return 0
