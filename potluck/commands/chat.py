"""`potluck chat`: talk with the head that runs on this host."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.conversation import converse
from potluck.head_file import running_head
from potluck.options import DEFAULT_TEMPERATURE, TemperatureOption


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    temperature: TemperatureOption = DEFAULT_TEMPERATURE,
) -> None:
    """Chat with the running head. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    head = running_head()
    converse(head.url, head.model, {"temperature": temperature}, system=system)
