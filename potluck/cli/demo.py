"""`potluck demo` serves a real chat model with three workers on this host and asks it a question."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from potluck.cli.chat_client import ChatAnswer, stream_chat
from potluck.cli.options import JsonOption, with_settings
from potluck.cli.session import running_head_of
from potluck.cli.status import show_stages
from potluck.cli.terminal import show_text, stderr, stdout
from potluck.head.head import Head
from potluck.head.status import StatusReport
from potluck.system.settings import Settings

DEMO_MODEL = "smollm2"
DEMO_DEVICES = ("torch:cpu", "mlx", "torch:cpu")
DEMO_QUESTION = "What is a potluck dinner? Answer in two sentences."
_MAX_TOKENS = 80


@with_settings("port", "threads", "quantize", "kv_cache", "prefix_cache")
def demo(
    settings: Settings,
    once: Annotated[bool, typer.Option("--once", help="Exit after the answer instead of serving on.")] = False,
    json_output: JsonOption = False,
    question: Annotated[str, typer.Option("--question", help="What to ask.")] = DEMO_QUESTION,
) -> None:
    """Pool three workers on this machine (torch, MLX, torch), serve SmolLM2 over them, and ask it something."""
    console = stderr if json_output else stdout
    settings = replace(
        settings,
        model=DEMO_MODEL,
        # In the order given, torch, MLX, torch: the best ring would have another.
        device=DEMO_DEVICES,
        use_all=True,
        objective="proportional",
        # For this computer alone, whatever the config file opens.
        host="127.0.0.1",
        lan=False,
    )
    with running_head_of(settings, console) as head:
        answer = _ask_question(head, question, console)
        report = head.report()
        console.print()
        show_stages(console, report)
        console.print(
            f"{answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s, first token after {answer.ttft_s:.2f} s",
            highlight=False,
        )
        if json_output:
            stdout.file.write(json.dumps(_facts(report, answer)) + "\n")
            stdout.file.flush()
        if not once:
            console.print(f"Serving at [bold]{head.url}[/bold] (chat page there, API under /v1). Ctrl-C stops it.")
            head.wait()


def _ask_question(head: Head, question: str, console: Console) -> ChatAnswer:
    console.print(f"\n[bold cyan]You:[/bold cyan] {question}\n[bold green]{head.model_name}:[/bold green] ", end="")

    def show(text: str) -> None:
        show_text(console, text)

    options = {"temperature": 0, "max_tokens": _MAX_TOKENS}
    answer = stream_chat(
        head.url, [{"role": "user", "content": question}], model=head.model_name, on_text=show, options=options
    )
    console.print()
    return answer


def _facts(report: StatusReport, answer: ChatAnswer) -> dict[str, Any]:
    return {
        "model": report.model,
        "url": report.url,
        "answer": answer.text,
        "tokens": answer.tokens,
        "tokens_per_s": round(answer.tokens_per_s, 2),
        "ttft_s": round(answer.ttft_s, 3),
        "stages": [
            {
                "device": stage.device,
                "backend": stage.backend,
                "first": stage.first,
                "last": stage.last,
                "weights_bytes": stage.weights_bytes,
                "kv_bytes": stage.kv_reserved_bytes,
                "ms_per_token": round(stage.ms_per_token, 2) if stage.ms_per_token is not None else None,
            }
            for stage in report.stages
        ],
    }
