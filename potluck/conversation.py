"""A chat in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from potluck.ask import ask
from potluck.terminal import data, errors, show_text
from transport.errors import BadRequest, Busy


def converse(url: str, model: str, options: Mapping[str, float | None], *, system: str | None = None) -> None:
    """Read lines and stream answers until the input ends. Ctrl-C stops an answer, or at the prompt the chat."""
    messages = [{"role": "system", "content": system}] if system else []
    errors.print(f"Chatting with {model} at {url}. Ctrl-C stops an answer, Ctrl-D ends the chat.", highlight=False)
    while True:
        try:
            line = data.input("[bold cyan]>[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            data.print()
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(url, model, messages, options)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _answer(url: str, model: str, messages: list[dict[str, str]], options: Mapping[str, float | None]) -> str | None:
    """What was said, also if it was stopped half-way; None if the request was refused, which is then shown."""
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        show_text(data, text)

    try:
        ask(url, messages, model=model, on_text=show, options=dict(options))
    except KeyboardInterrupt:
        errors.print(" [stopped]", markup=False)
    except (BadRequest, Busy) as error:
        errors.print(f"[red]{error.message}[/red]")
        return None
    data.print()
    return "".join(pieces)
