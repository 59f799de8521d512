"""`potluck run` and `potluck chat` ask the head of this host, once or in a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated

import typer

from potluck.cli.chat_client import stream_chat
from potluck.cli.options import DEFAULT_TEMPERATURE, JsonOption, TemperatureOption, with_settings
from potluck.cli.session import running_head_of, stored_model
from potluck.cli.terminal import show_text, stderr, stdout
from potluck.host.local_head import running_head
from potluck.system.settings import Settings
from transport.errors import BadRequest, Busy, NotRunning


@with_settings("offline", "device", "memory", "threads", "quantize", "kv_cache", "prefix_cache", "context")
def run(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="A model of the store, or a source to pull.")],
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, chat.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.")] = None,
    temperature: TemperatureOption = DEFAULT_TEMPERATURE,
    json_output: JsonOption = False,
) -> None:
    """Ask MODEL something and print the answer."""
    # For this answer alone, whatever the config file opens.
    settings = replace(settings, model=model, host="127.0.0.1", port=0)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    try:
        head = running_head()
    except NotRunning:
        with running_head_of(settings, stderr) as started:
            _answer_or_chat(started.url, started.model_name, prompt, options, json_output)
        return
    if head.model != model:  # Which need not be in this host's store, if the head serves it.
        requested = stored_model(settings, stderr)
        if head.model != requested.name:
            raise NotRunning(
                f"the head on this host serves {head.model}, not {requested.name}",
                hint=f"ask it with: potluck run {head.model}, or stop it first",
            )
    _answer_or_chat(head.url, head.model, prompt, options, json_output)


def _answer_or_chat(
    url: str, model: str, prompt: str | None, options: dict[str, float | None], json_output: bool
) -> None:
    if prompt is None:
        chat_loop(url, model, options)
        return

    def show(text: str) -> None:
        if not json_output:
            show_text(stdout, text)

    answer = stream_chat(url, [{"role": "user", "content": prompt}], model=model, on_text=show, options=options)
    if json_output:
        stdout.file.write(json.dumps({"model": model, **asdict(answer)}) + "\n")
    else:
        stdout.print()


def chat(
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    temperature: TemperatureOption = DEFAULT_TEMPERATURE,
) -> None:
    """Chat with the running head. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    head = running_head()
    chat_loop(head.url, head.model, {"temperature": temperature}, system=system)


def chat_loop(url: str, model: str, options: Mapping[str, float | None], *, system: str | None = None) -> None:
    """Read lines and stream answers until the input ends. Ctrl-C stops an answer, or at the prompt the chat."""
    messages = [{"role": "system", "content": system}] if system else []
    stderr.print(f"Chatting with {model} at {url}. Ctrl-C stops an answer, Ctrl-D ends the chat.", highlight=False)
    while True:
        try:
            line = stdout.input("[bold cyan]>[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            stdout.print()
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        answer = _stream_answer(url, model, messages, options)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _stream_answer(
    url: str, model: str, messages: list[dict[str, str]], options: Mapping[str, float | None]
) -> str | None:
    """What was said, also if it was stopped half-way; None if the request was refused, which is then shown."""
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        show_text(stdout, text)

    try:
        stream_chat(url, messages, model=model, on_text=show, options=dict(options))
    except KeyboardInterrupt:
        stderr.print(" [stopped]", markup=False)
    except (BadRequest, Busy) as error:
        stderr.print(f"[red]{error.message}[/red]")
        return None
    stdout.print()
    return "".join(pieces)
