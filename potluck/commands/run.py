"""`potluck run MODEL [PROMPT]`: one answer, or a chat, from the running head or one started for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from potluck.ask import ask
from potluck.conversation import converse
from potluck.head_file import running_head
from potluck.options import (
    DEFAULT_TEMPERATURE,
    ConfigOption,
    ContextOption,
    DeviceOption,
    JsonOption,
    KVCacheOption,
    MemoryOption,
    NoPrefixCacheOption,
    OfflineOption,
    QuantizeOption,
    TemperatureOption,
    ThreadsOption,
    settings_with,
)
from potluck.session import model_of, running_head_of
from potluck.terminal import data, errors, show_text
from transport.errors import NotRunning


def register(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    model: Annotated[str, typer.Argument(help="A model of the store, or a source to pull.")],
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, chat.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.")] = None,
    temperature: TemperatureOption = DEFAULT_TEMPERATURE,
    offline: OfflineOption = False,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    quantize: QuantizeOption = None,
    kv_cache: KVCacheOption = None,
    no_prefix_cache: NoPrefixCacheOption = False,
    context: ContextOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Ask MODEL something and print the answer."""
    settings = settings_with(
        config,
        model=model,
        offline=offline,
        devices=device,
        memory=memory,
        threads=threads,
        quantize=quantize,
        kv_cache=kv_cache,
        no_prefix_cache=no_prefix_cache,
        context=context,
        # For this answer alone, whatever the config file opens.
        host="127.0.0.1",
        port=0,
    )
    options = {"max_tokens": max_tokens, "temperature": temperature}
    try:
        head = running_head()
    except NotRunning:
        with running_head_of(settings, errors) as started:
            _talk(started.url, started.model_name, prompt, options, json_output)
        return
    if head.model != model:  # Which need not be in this host's store, if the head serves it.
        wanted = model_of(settings, errors)
        if head.model != wanted.name:
            raise NotRunning(
                f"the head on this host serves {head.model}, not {wanted.name}",
                hint=f"ask it with: potluck run {head.model}, or stop it first",
            )
    _talk(head.url, head.model, prompt, options, json_output)


def _talk(url: str, model: str, prompt: str | None, options: dict[str, float | None], json_output: bool) -> None:
    if prompt is None:
        converse(url, model, options)
        return

    def show(text: str) -> None:
        if not json_output:
            show_text(data, text)

    answer = ask(url, [{"role": "user", "content": prompt}], model=model, on_text=show, options=options)
    if json_output:
        data.file.write(json.dumps({"model": model, **asdict(answer)}) + "\n")
    else:
        data.print()
