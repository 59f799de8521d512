"""`potluck up` and llama.cpp's server beside each other: the same file, two stages each, chats over HTTP."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.head_process import CommandProcess
from bench.load import CellTimes, Stream
from bench.load_answer import answer_of
from bench.load_endpoint import Endpoint, find_endpoint
from bench.load_http import Exchange
from bench.peer_llama import llama_server
from bench.scheduling_prompts import Prompts
from bench.scheduling_report import PEER_STREAMS
from bench.stage_report import Round
from potluck.store import StoredModel

_PROMPT, _OUTPUT = 128, 64
_UP_WITHIN_S = 600.0
_SILENCE_S = 300.0
_SLOTS = max(PEER_STREAMS)
_CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One of those that are compared."""

    name: str
    endpoint: Endpoint


@contextmanager
def servers(
    model: StoredModel, llama: Path | None, up_options: Sequence[str], eos_ids: frozenset[int]
) -> Iterator[list[Server]]:
    """Ours, with these options of `potluck up`, and llama.cpp's if there is one; answers don't end before their length.
    Raises RuntimeError."""
    with ExitStack() as stack:
        runtime = stack.enter_context(tempfile.TemporaryDirectory(prefix="plb-"))
        environment = {**os.environ, "POTLUCK_RUNTIME": runtime}
        context = ("--context", str(_CONTEXT_TOKENS), "--concurrency", str(_SLOTS))
        head = CommandProcess(
            ["up", model.name, *up_options, *context, "--port", "0", "--json"],
            functools.partial(subprocess.Popen, env=environment),
        )
        stack.callback(head.stop)
        fields = {"stream_options": {"include_usage": True}, "logit_bias": dict.fromkeys(map(str, eos_ids), -100)}
        found = [_server("potluck", head.wait_for_facts(_UP_WITHIN_S)["url"], fields)]
        if llama is not None:
            (gguf,) = model.path.glob("*.gguf")
            url = stack.enter_context(
                llama_server(llama, gguf, num_stages=2, slots=_SLOTS, context_tokens=_CONTEXT_TOKENS)
            )
            found.append(_server("llama.cpp", url, fields))
        yield found


def _server(name: str, url: str, fields: Mapping[str, Any]) -> Server:
    endpoint = asyncio.run(find_endpoint(url, model=None, key=""))
    return Server(name=name, endpoint=replace(endpoint, fields=fields))


def peer(found: Sequence[Server], prompts: Prompts, number: int) -> Round:
    """1, 2 and 4 chats of 128 + 64 tokens: tokens/s with the prompts' time, and of decoding."""
    values: Round = {}
    for count in PEER_STREAMS:
        for server in found if number % 2 == 0 else found[::-1]:
            times = chats(server, prompts, count, _PROMPT, _OUTPUT)
            values[f"{server.name} {count} end to end"] = times.tokens_per_s
            values[f"{server.name} {count} decode"] = times.decode_tokens_per_s
            values[f"{server.name} {count} first token s"] = times.ttft_s
    return values


def chats(server: Server, prompts: Prompts, count: int, prompt_tokens: int, num_tokens: int) -> CellTimes:
    """`count` at once, greedy, each answered with `num_tokens`. Raises RuntimeError with what the server said."""
    said = [[{"role": "user", "content": text}] for text in prompts.texts(count, prompt_tokens)]
    found = [Exchange() for _ in said]

    async def all_of_them() -> None:
        pairs = zip(said, found, strict=True)
        await asyncio.gather(
            *(server.endpoint.chat(messages, num_tokens, into, silence_s=_SILENCE_S) for messages, into in pairs)
        )

    asyncio.run(all_of_them())
    return CellTimes(streams=tuple(_stream(server.name, exchange) for exchange in found))


def _stream(name: str, found: Exchange) -> Stream:
    answer = answer_of(found)
    if answer.error or not answer.has_usage:
        raise RuntimeError(f"{name} said {answer.error or 'nothing of its tokens'}")
    return Stream(
        started_s=found.started_s,
        ended_s=found.ended_s,
        chunks_s=tuple(arrival.at_s for arrival in answer.arrivals),
        prompt_tokens=answer.prompt_tokens or 0,
        tokens=answer.tokens,
    )
