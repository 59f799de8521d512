"""`potluck bench`: what the ring delivers. The bench is a program of its own, above this package: this becomes it."""

from __future__ import annotations

import os
import sys

import typer


def register(app: typer.Typer) -> None:
    app.command(
        "bench",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(bench)


def bench(context: typer.Context) -> None:
    """Measure tokens/s, time to first token and gaps: of the running head, of one with MODEL, or, with --serve, of any
    endpoint under load (--help says more)."""
    # Not the context's: it has lost the "--" that stands before options for the head.
    at = sys.argv.index("bench") + 1 if "bench" in sys.argv else len(sys.argv)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bench.serve", *(sys.argv[at:] or context.args)])
