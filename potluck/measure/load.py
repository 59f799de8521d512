"""Load as a service sees it, on the head that runs here, on one that this starts, or on any OpenAI-compatible endpoint.

potluck bench --serve [--clients 1 4 16] [--rate 2.5] [--duration 30 | --requests 100] [--warm-up 5] [--rounds 1]
                      [--prompt 32:3 512] [--output 64] [--shared-prefix 256] [--turns 3] [--seed 0]
                      [--url URL …] [--model NAME] [--tokenizer FOLDER] [--timeout 300]
                      [--json [FILE]] [--markdown FILE] [--plot FILE] [MODEL -- OPTIONS OF potluck up]

Closed loop: each of --clients sends its next request when it has the answer to the last. Open loop: requests come at
--rate a second whatever has been answered, as a Poisson process, and times count from when one is due. Prompts differ
from their first word on, also from those of every other run, so that a prefix cache helps only with --shared-prefix and
--turns. Answers have --output tokens where the endpoint can be told not to end before.

Several --url take turns, round after round, because machines drift; ratios are to the first. An API key is read from
OPENAI_API_KEY. Ctrl-C ends the run and shows what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from potluck.host.local_head import running_head
from potluck.measure.endpoint import LoadEndpoint, find_endpoint, prepare_endpoint
from potluck.measure.head_process import END_SIGNALS, UP_WITHIN_S, CommandProcess, stop_on_signals
from potluck.measure.load_report import markdown, plot, text
from potluck.measure.load_run import (
    ChatGenerator,
    ChatMix,
    LoadCell,
    LoadOutcome,
    LoadRun,
    LoadWindow,
    WordsOf,
    by_tokenizer,
    by_usage,
    tokenizer_of,
)
from potluck.measure.result import hardware_facts, say, write_result
from potluck.measure.summary import Trial, row_of, trial_of
from potluck.store.store import Store
from potluck.system.paths import home_dir
from transport.errors import ConfigError, ModelNotFound, PotluckError

if TYPE_CHECKING:
    from potluck.engine.tokenizer import Tokenizer


class _LoadArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint="see: potluck bench --serve --help")


def options_of(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The bench's own, and those of `potluck up`. Raises ConfigError where they are wrong."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = _LoadArgumentParser(
        prog="potluck bench --serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default=None, help="start a head with it; default: the running one, or --url")
    add("--url", action="append", default=[], help="an endpoint, with or without /v1; several are compared")
    add("--model", dest="model_name", default=None, help="its model; default: the first that it lists")
    add("--tokenizer", default=None, help="a folder or a model of the store: exact prompt lengths for --url")
    add("--clients", type=_count, nargs="+", default=None, help="closed loop: clients at once (default: 1 4)")
    add("--rate", type=_positive, nargs="+", default=None, help="open loop: requests that come a second")
    add("--duration", type=_positive, default=30.0, help="seconds that are measured")
    add("--requests", type=_count, default=None, help="or until so many requests were answered")
    add("--warm-up", type=_seconds, default=5.0, help="seconds of the same load before")
    add("--prompt", type=_length, nargs="+", default=[(128, 1.0)], help="tokens of a prompt: N, or N:WEIGHT to mix")
    add("--output", type=_count, default=64, help="tokens of an answer")
    add("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with")
    add("--turns", type=_count, default=1, help="messages of a chat, each sent with the answers before it")
    add("--rounds", type=_count, default=None, help="default: 1, or 3 with several endpoints")
    add("--seed", type=int, default=0, help="of arrivals, lengths and words")
    add("--timeout", type=_positive, default=300.0, help="seconds without news after which a request is given up")
    add("--json", type=Path, nargs="?", const=Path("-"), default=None, help="to FILE, or instead of the table")
    add("--markdown", type=Path, default=None, help="write the table to this file")
    add("--plot", type=Path, default=None, help="draw to this file (.png, .svg); needs potluck[plots]")
    options = parser.parse_args(list(arguments[:at]))
    up_options = list(arguments[at + 1 :])
    if up_options and options.model is None:
        parser.error("options after -- are for a head that is started: name a MODEL")
    if not 0 <= options.shared_prefix < min(tokens for tokens, _ in options.prompt):
        parser.error("--shared-prefix must be shorter than every --prompt")
    if options.output < 2:
        parser.error("--output is too small: gaps need 2 tokens")
    for file in (options.json, options.markdown, options.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"there is no folder {file.parent}")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib", hint="pip install 'potluck[plots]'")
    if options.clients is None and options.rate is None:
        options.clients = [1, 4]
    return options, up_options


def _count(given: str) -> int:
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given} is not a number from 1 on")
    return int(given)


def _seconds(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{given} is not a number from 0 on")
    return value


def _positive(given: str) -> float:
    value = _seconds(given)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{given} is not a number above 0")
    return value


def _length(given: str) -> tuple[int, float]:
    tokens, _, weight = given.partition(":")
    return _count(tokens), _positive(weight) if weight else 1.0


_SALT_STRIDE = 7919


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to run, in turns: every round, every cell, every endpoint."""

    endpoints: Sequence[LoadEndpoint]
    cells: Sequence[LoadCell]
    rounds: int
    mix: ChatMix
    span: LoadWindow
    words_of: WordsOf
    seed: int


class LoadMeasurement:
    """Trials as they come in; rows of what there is."""

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self._trials: dict[tuple[int, int], list[Trial]] = {}
        self.is_interrupted = False
        self.failure = ""

    def run(self) -> None:
        """Until all is measured, Ctrl-C, or an endpoint that only fails."""
        plan, salt = self._plan, secrets.randbelow(10**6)
        number = 0
        for turn in range(plan.rounds):
            for place, cell in enumerate(plan.cells):
                number += 1
                for which, endpoint in enumerate(plan.endpoints):
                    say(f"round {turn + 1} of {plan.rounds}: {cell} at {endpoint.url}")
                    chats = ChatGenerator(
                        plan.mix, plan.words_of, seed=plan.seed + number, salt=salt + number * _SALT_STRIDE
                    )
                    outcome = asyncio.run(self._run_trial(endpoint, chats, cell, plan.seed + number))
                    stop_on_signals()  # a loop that ends leaves them as the system had them
                    trial = trial_of(outcome, cell)
                    if trial is not None:
                        self._trials.setdefault((place, which), []).append(trial)
                    self.is_interrupted = outcome.is_interrupted
                    self.failure = f"{endpoint.url}: every request fails: {outcome.failure}" if outcome.failure else ""
                    if self.is_interrupted or self.failure:
                        return

    async def _run_trial(self, endpoint: LoadEndpoint, chats: ChatGenerator, cell: LoadCell, seed: int) -> LoadOutcome:
        stop = asyncio.Event()
        with contextlib.suppress(NotImplementedError):
            for number in (signal.SIGINT, *END_SIGNALS):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
        mix = self._plan.mix
        load = LoadRun(endpoint, chats, cell, self._plan.span, output=mix.output, turns=mix.turns, seed=seed, stop=stop)
        return await load.run()

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for (place, which), trials in sorted(self._trials.items()):
            first = self._trials.get((place, 0)) if which else None
            rows.append(row_of(self._plan.endpoints[which].url, self._plan.cells[place], trials, first))
        return rows


async def _prepare_endpoints(
    urls: Sequence[str], options: argparse.Namespace, key: str, tokenizer: Tokenizer | None
) -> tuple[list[LoadEndpoint], WordsOf, str]:
    """Endpoints that have answered, words for lengths, and by what: "tokenizer", "usage" or "words"."""
    endpoints = []
    for url in urls:
        found = await find_endpoint(url, model=options.model_name, key=key)
        own = tokenizer
        if own is None and found.is_potluck:
            with contextlib.suppress(ModelNotFound, ConfigError):
                own = tokenizer_of(found.model)
                tokenizer = own
        eos_ids = sorted(own.eos_ids) if own is not None and (found.is_potluck or options.tokenizer) else []
        ready, answer = await prepare_endpoint(found, eos_ids, silence_s=options.timeout)
        if not answer.has_usage:
            say(f"{ready.url} gives no usage: a token is an event of its stream")
        endpoints.append(ready)
    if tokenizer is not None:
        return endpoints, by_tokenizer(tokenizer), "tokenizer"
    for endpoint in endpoints:
        words_of = await by_usage(endpoint, silence_s=options.timeout)
        if words_of is not None:
            return endpoints, words_of, "usage"
    say("no tokenizer and no usage: --prompt counts words (--tokenizer FOLDER makes it exact)")
    return endpoints, lambda tokens: max(0, tokens - 1), "words"


def measure(options: argparse.Namespace, up_options: Sequence[str], stack: ExitStack) -> tuple[dict[str, Any], str]:
    """The result, and what went wrong on the way to it. A head that is started stops with `stack`."""
    tokenizer = tokenizer_of(options.tokenizer) if options.tokenizer else None
    urls, key = list(options.url), os.environ.get("OPENAI_API_KEY", "").strip() if options.url else ""
    if options.model is not None:
        model = Store(home_dir()).resolve(options.model)
        say(f"starting {model.name}")
        head = CommandProcess(["up", options.model, "--port", "0", *up_options, "--json"])
        stack.callback(head.stop)
        urls.insert(0, head.wait_for_facts(UP_WITHIN_S)["url"])
        tokenizer = tokenizer or tokenizer_of(model.name)
    elif not urls:
        running = running_head()
        urls.append(running.url)
        tokenizer = tokenizer or tokenizer_of(running.model)
    endpoints, words_of, lengths_by = asyncio.run(_prepare_endpoints(urls, options, key, tokenizer))
    cells = [LoadCell(clients=clients) for clients in options.clients or ()]
    cells += [LoadCell(rate_per_s=rate) for rate in options.rate or ()]
    rounds = options.rounds or (3 if len(endpoints) > 1 else 1)
    mix = ChatMix(
        lengths=tuple(options.prompt), output=options.output, shared_prefix=options.shared_prefix, turns=options.turns
    )
    span = LoadWindow(
        warm_up_s=options.warm_up,
        duration_s=None if options.requests else options.duration,
        requests=options.requests,
        drain_s=max(10.0, options.duration),
        silence_s=options.timeout,
    )
    plan = LoadPlan(
        endpoints=endpoints, cells=cells, rounds=rounds, mix=mix, span=span, words_of=words_of, seed=options.seed
    )
    measured = LoadMeasurement(plan)
    try:
        measured.run()
    except KeyboardInterrupt:  # between two trials
        measured.is_interrupted = True
    result = {
        **hardware_facts(),
        "options": list(up_options),
        "endpoints": [
            {"url": each.url, "model": each.model, "owner": each.owner, "fields": sorted(each.fields)}
            for each in endpoints
        ],
        "mix": asdict(mix),
        "span": asdict(span),
        "rounds": rounds,
        "seed": options.seed,
        "prompt_lengths_by": lengths_by,
        "is_interrupted": measured.is_interrupted,
        "rows": measured.rows(),
    }
    return result, measured.failure


def main(arguments: Sequence[str]) -> int:
    stop_on_signals()
    try:
        options, up_options = options_of(arguments)
        with ExitStack() as stack:
            result, failure = measure(options, up_options, stack)
            _show(result, options)
    except (PotluckError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    if failure:
        say(f"error: {failure}")
        return 1
    return 130 if result["is_interrupted"] else 0


def _show(result: dict[str, Any], options: argparse.Namespace) -> None:
    if not result["rows"]:
        say("nothing was measured")
    to_stdout = str(options.json) == "-"
    write_result(result, None if to_stdout else options.json, shown=None if to_stdout else text(result))
    if options.markdown is not None:
        options.markdown.write_text(markdown(result), encoding="utf-8")
    if options.plot is not None:
        plot(result, options.plot)
