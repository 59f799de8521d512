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
import asyncio
import itertools
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from potluck.head.planning import profile_of
from potluck.host.local_head import running_head
from potluck.measure.endpoint import answer_of, find_endpoint
from potluck.measure.head_process import UP_WITHIN_S, CommandProcess, status_of, stop_on_signals
from potluck.measure.http_client import HttpExchange
from potluck.measure.load_report import markdown_table, new_figure
from potluck.measure.load_run import ChatGenerator, ChatMix, by_tokenizer, tokenizer_of
from potluck.measure.result import hardware_facts, say, write_result
from potluck.measure.summary import (
    StageUse,
    bandwidth_bound_tokens_per_s,
    decode_tokens_per_s,
    percentile,
    stage_use_between,
)
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.paths import home_dir
from transport.errors import PotluckError

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
    title = (
        f"{result['model']} on {result['processor']} ({result['cores']} cores), {result['date']}, "
        f"commit {result['commit']}, medians of {result['rounds']}"
    )
    lines = [title, "", *markdown_table(_HEADINGS, [_cells(row) for row in result["rows"]])]
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
    figure = new_figure(7, 4.5)
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


_WARM_TOKENS = 8
_SILENCE_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GridCell:
    """`concurrency` chats at once, each of `prompt` and `output` tokens."""

    prompt: int
    output: int
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GridTrial:
    """One cell, once: `tokens_per_s` counts the prompts' time, `decode_tokens_per_s` does not."""

    prompt_tokens: int
    tokens_per_s: float
    decode_tokens_per_s: float
    ttft_s: float
    gaps_s: list[float]
    uses: list[StageUse]


class GridClient:
    """Sends chats of a cell to the head at `url`; answers do not end before their length."""

    def __init__(self, url: str, model: StoredModel) -> None:
        tokenizer = tokenizer_of(str(model.path))
        self._url = url
        self._words_of = by_tokenizer(tokenizer)
        self._salts = itertools.count(int(time.time()), 7919)
        endpoint = asyncio.run(find_endpoint(url, model=model.name, key=""))
        bias = {str(token_id): -100 for token_id in tokenizer.eos_ids}
        self._endpoint = replace(endpoint, fields={"stream_options": {"include_usage": True}, "logit_bias": bias})

    def run(self, cell: GridCell) -> GridTrial:
        """Raises RuntimeError with the head's message if a chat fails."""
        mix = ChatMix(lengths=((cell.prompt, 1.0),), output=cell.output)
        chats = ChatGenerator(mix, self._words_of, seed=0, salt=next(self._salts))
        texts = [message.text for chat in itertools.islice(chats, cell.concurrency) for message in chat]
        before, started_s = status_of(self._url)["stages"], time.perf_counter()
        exchanges = asyncio.run(self._chat(texts, cell.output))
        wall_s = time.perf_counter() - started_s
        answers = [answer_of(each) for each in exchanges]
        for answer in answers:
            if answer.error:
                raise RuntimeError(f"{self._url} answered {answer.error}")
        arrivals = [[arrival.at_s for arrival in answer.arrivals] for answer in answers]
        tokens = sum(answer.tokens for answer in answers)
        begin_s, end_s = min(each.started_s for each in exchanges), max(each.ended_s for each in exchanges)
        return GridTrial(
            prompt_tokens=answers[0].prompt_tokens or 0,
            tokens_per_s=tokens / (end_s - begin_s),
            decode_tokens_per_s=decode_tokens_per_s(arrivals, tokens),
            ttft_s=median(at_s[0] - each.started_s for at_s, each in zip(arrivals, exchanges, strict=True)),
            gaps_s=[pause for answer in answers for pause in answer.pauses_s],
            uses=stage_use_between(before, status_of(self._url)["stages"], wall_s, concurrency=cell.concurrency),
        )

    async def _chat(self, texts: Sequence[str], output: int) -> list[HttpExchange]:
        exchanges = [HttpExchange() for _ in texts]
        await asyncio.gather(
            *(
                self._endpoint.chat([{"role": "user", "content": text}], output, found, silence_s=_SILENCE_S)
                for text, found in zip(texts, exchanges, strict=True)
            )
        )
        return exchanges


def measure_head(
    url: str, model: StoredModel, cells: Sequence[GridCell], rounds: int, *, name: str
) -> list[dict[str, Any]]:
    """One row a cell. Raises RuntimeError if the head fails a chat."""
    client = GridClient(url, model)
    for count in sorted({cell.concurrency for cell in cells}):
        client.run(GridCell(prompt=_WARM_TOKENS, output=_WARM_TOKENS, concurrency=count))
    found: dict[GridCell, list[GridTrial]] = {cell: [] for cell in cells}
    for number in range(rounds):
        for cell in cells:
            say(f"{name}, round {number + 1} of {rounds}: {cell.concurrency} × {cell.prompt} + {cell.output} tokens")
            found[cell].append(client.run(cell))
    status = status_of(url)
    return [_row(name, cell, trials, model, status) for cell, trials in found.items()]


def _row(
    name: str, cell: GridCell, trials: Sequence[GridTrial], model: StoredModel, status: dict[str, Any]
) -> dict[str, Any]:
    """Medians over rounds. `gap_…_s` are between tokens of one chat; `bound_tokens_per_s` is what reading the weights
    alone allows."""
    rates = [trial.decode_tokens_per_s for trial in trials]
    profile = profile_of(model, status["plan"]["weights"])
    gaps = {
        f"gap_p{percent}_s": median(percentile(trial.gaps_s, percent) or 0.0 for trial in trials)
        for percent in (50, 95, 99)
    }
    return {
        "ring": name,
        "prompt_tokens": trials[0].prompt_tokens,
        "output_tokens": cell.output,
        "concurrency": cell.concurrency,
        "tokens_per_s": median(trial.tokens_per_s for trial in trials),
        "decode_tokens_per_s": median(rates),
        "decode_min_max": (min(rates), max(rates)),
        "ttft_s": median(trial.ttft_s for trial in trials),
        **gaps,
        "predicted_tokens_per_s": _predicted(status, cell),
        "bound_tokens_per_s": bandwidth_bound_tokens_per_s(profile, status["stages"], cell.concurrency),
        "stages": [asdict(use) for use in trials[-1].uses],
    }


def _predicted(status: dict[str, Any], cell: GridCell) -> float | None:
    """The plan's prediction for one chat or for as many as it was made for; whatever their lengths."""
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
    return {"model": model.name, "rows": rows, "status": status_of(head.url)}


def measure_started(
    name: str, options: Sequence[str], cells: Sequence[GridCell], rounds: int, *, singles: bool
) -> dict[str, Any]:
    """A head of its own, and then, one after another, each of its devices alone."""
    model = Store(home_dir()).resolve(name)
    rings: list[tuple[str, list[str]]] = [("ring", [])]
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    status: dict[str, Any] = {}
    while rings:
        ring, layers = rings.pop(0)
        say(f"starting {ring}")
        with ExitStack() as stack:
            head = CommandProcess(["up", name, "--port", "0", *options, *layers, "--json"])
            stack.callback(head.stop)
            try:
                url = head.wait_for_facts(UP_WITHIN_S)["url"]
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
    return {"model": model.name, "rows": rows, "left_out": left_out, "status": status}


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
    stop_on_signals()
    cells = [
        GridCell(prompt=prompt, output=output, concurrency=concurrency)
        for concurrency, prompt, output in itertools.product(options.concurrency, options.prompt, options.output)
    ]
    try:
        if options.model is None:
            found = measure_running(cells, options.rounds)
        else:
            found = measure_started(options.model, up_options, cells, options.rounds, singles=options.singles)
        result = {**hardware_facts(), "options": up_options, "rounds": options.rounds, **found}
        table = markdown(result)
        if options.markdown is not None:
            options.markdown.write_text(table, encoding="utf-8")
        if options.plot is not None:
            plot(result, options.plot)
    except (PotluckError, RuntimeError, httpx.HTTPError, subprocess.SubprocessError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    write_result(result, options.json, shown=None if options.json is None else table)
    return 0
