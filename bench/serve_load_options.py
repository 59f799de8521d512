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
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from transport.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint="see: potluck bench --serve --help")


def options_of(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The bench's own, and those of `potluck up`. Raises ConfigError where they are wrong."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = _Parser(
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
