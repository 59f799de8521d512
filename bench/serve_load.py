"""Runs `potluck bench --serve`: endpoints found and tried, spells of load in turns, results shown."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench.hardware import facts
from bench.head_process import CommandProcess
from bench.load_arrivals import Chats, Mix
from bench.load_endpoint import Endpoint, find_endpoint, prepare
from bench.load_lengths import WordsOf, by_tokenizer, by_usage, tokenizer_of
from bench.load_run import Cell, LoadRun, Outcome, Span
from bench.load_summary import Spell, row_of, spell_of
from bench.serve_load_options import options_of
from bench.serve_load_report import markdown, plot, text
from potluck.head_file import running_head
from potluck.paths import home_dir
from potluck.store import Store
from transport.errors import ConfigError, ModelNotFound, PotluckError

if TYPE_CHECKING:
    from potluck.engine.tokenizer import Tokenizer

_UP_WITHIN_S = 3600.0
_APART = 7919


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run, in turns: every round, every cell, every endpoint."""

    endpoints: Sequence[Endpoint]
    cells: Sequence[Cell]
    rounds: int
    mix: Mix
    span: Span
    words_of: WordsOf
    seed: int


class Measured:
    """Spells as they come in; rows of what there is."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._spells: dict[tuple[int, int], list[Spell]] = {}
        self.is_interrupted = False
        self.trouble = ""

    def run(self) -> None:
        """Until all is measured, Ctrl-C, or an endpoint that only fails."""
        plan, salt = self._plan, secrets.randbelow(10**6)
        number = 0
        for turn in range(plan.rounds):
            for place, cell in enumerate(plan.cells):
                number += 1
                for which, endpoint in enumerate(plan.endpoints):
                    _say(f"round {turn + 1} of {plan.rounds}: {cell} at {endpoint.url}")
                    chats = Chats(plan.mix, plan.words_of, seed=plan.seed + number, salt=salt + number * _APART)
                    outcome = asyncio.run(self._spell(endpoint, chats, cell, plan.seed + number))
                    _interrupt_on_signals()  # a loop that ends leaves them as the system had them
                    spell = spell_of(outcome, cell)
                    if spell is not None:
                        self._spells.setdefault((place, which), []).append(spell)
                    self.is_interrupted = outcome.is_interrupted
                    self.trouble = f"{endpoint.url}: every request fails: {outcome.trouble}" if outcome.trouble else ""
                    if self.is_interrupted or self.trouble:
                        return

    async def _spell(self, endpoint: Endpoint, chats: Chats, cell: Cell, seed: int) -> Outcome:
        stop = asyncio.Event()
        with contextlib.suppress(NotImplementedError):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
        mix = self._plan.mix
        load = LoadRun(endpoint, chats, cell, self._plan.span, output=mix.output, turns=mix.turns, seed=seed, stop=stop)
        return await load.run()

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for (place, which), spells in sorted(self._spells.items()):
            first = self._spells.get((place, 0)) if which else None
            rows.append(row_of(self._plan.endpoints[which].url, self._plan.cells[place], spells, first))
        return rows


async def _prepared(
    urls: Sequence[str], options: argparse.Namespace, key: str, tokenizer: Tokenizer | None
) -> tuple[list[Endpoint], WordsOf, str]:
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
        ready, answer = await prepare(found, eos_ids, silence_s=options.timeout)
        if not answer.has_usage:
            _say(f"{ready.url} gives no usage: a token is an event of its stream")
        endpoints.append(ready)
    if tokenizer is not None:
        return endpoints, by_tokenizer(tokenizer), "tokenizer"
    for endpoint in endpoints:
        words_of = await by_usage(endpoint, silence_s=options.timeout)
        if words_of is not None:
            return endpoints, words_of, "usage"
    _say("no tokenizer and no usage: --prompt counts words (--tokenizer FOLDER makes it exact)")
    return endpoints, lambda tokens: max(0, tokens - 1), "words"


def measure(options: argparse.Namespace, up_options: Sequence[str], stack: ExitStack) -> tuple[dict[str, Any], str]:
    """The result, and what went wrong on the way to it. A head that is started stops with `stack`."""
    tokenizer = tokenizer_of(options.tokenizer) if options.tokenizer else None
    urls, key = list(options.url), os.environ.get("OPENAI_API_KEY", "").strip() if options.url else ""
    if options.model is not None:
        model = Store(home_dir()).resolve(options.model)
        _say(f"starting {model.name}")
        head = CommandProcess(["up", options.model, "--port", "0", *up_options, "--json"])
        stack.callback(head.stop)
        urls.insert(0, head.wait_for_facts(_UP_WITHIN_S)["url"])
        tokenizer = tokenizer or tokenizer_of(model.name)
    elif not urls:
        running = running_head()
        urls.append(running.url)
        tokenizer = tokenizer or tokenizer_of(running.model)
    endpoints, words_of, lengths_by = asyncio.run(_prepared(urls, options, key, tokenizer))
    cells = [Cell(clients=clients) for clients in options.clients or ()]
    cells += [Cell(rate_per_s=rate) for rate in options.rate or ()]
    rounds = options.rounds or (3 if len(endpoints) > 1 else 1)
    mix = Mix(
        lengths=tuple(options.prompt), output=options.output, shared_prefix=options.shared_prefix, turns=options.turns
    )
    span = Span(
        warm_up_s=options.warm_up,
        duration_s=None if options.requests else options.duration,
        requests=options.requests,
        drain_s=max(10.0, options.duration),
        silence_s=options.timeout,
    )
    plan = Plan(
        endpoints=endpoints, cells=cells, rounds=rounds, mix=mix, span=span, words_of=words_of, seed=options.seed
    )
    measured = Measured(plan)
    try:
        measured.run()
    except KeyboardInterrupt:  # between two spells
        measured.is_interrupted = True
    result = {
        **facts(),
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
    return result, measured.trouble


def main(arguments: Sequence[str]) -> int:
    _interrupt_on_signals()
    try:
        options, up_options = options_of(arguments)
        with ExitStack() as stack:
            result, trouble = measure(options, up_options, stack)
            _show(result, options)
    except (PotluckError, RuntimeError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    if trouble:
        _say(f"error: {trouble}")
        return 1
    return 130 if result["is_interrupted"] else 0


def _show(result: dict[str, Any], options: argparse.Namespace) -> None:
    if not result["rows"]:
        _say("nothing was measured")
    if options.json is not None and str(options.json) != "-":
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2) if str(options.json) == "-" else text(result), end="")
    if options.markdown is not None:
        options.markdown.write_text(markdown(result))
    if options.plot is not None:
        plot(result, options.plot)


def _interrupt_on_signals() -> None:
    """Also those that would end this process without stopping the head."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
