"""`potluck bench` starts the benchmark program, which measures what a ring delivers."""

from __future__ import annotations

import os
import sys

import typer


def bench(context: typer.Context) -> None:
    """Measure tokens/s, time to first token and gaps: of the running head, of one with MODEL, or, with --serve, of any
    endpoint under load (--help says more)."""
    # Not the context's: it has lost the "--" that stands before options for the head.
    at = sys.argv.index("bench") + 1 if "bench" in sys.argv else len(sys.argv)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "potluck.measure", *(sys.argv[at:] or context.args)])
