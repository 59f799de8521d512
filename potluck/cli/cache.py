"""`potluck cache` shows and limits what this host keeps of models that lie on other hosts."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from potluck.cli.options import JsonOption
from potluck.cli.terminal import stderr, stdout
from potluck.host.piece_cache import CacheReport, clear_cache, report_cache
from potluck.system.byte_sizes import format_bytes, parse_bytes
from potluck.system.paths import pieces_dir
from transport.errors import ConfigError
from transport.pieces.disk_space import write_limit
from transport.pieces.store import PieceStore

_NO_LIMIT = "none"
LimitOption = Annotated[
    str | None,
    typer.Option("--limit", help=f'The most it may take, such as "50GB", or {_NO_LIMIT}. It is kept.'),
]


def cache(context: typer.Context, limit: LimitOption = None, json_output: JsonOption = False) -> None:
    """Show what is kept of models that lie on other hosts, and set how much that may be.

    What was not used for longest goes first when there is no room; what running workers use stays.
    """
    if context.invoked_subcommand is not None:
        return
    if limit is not None:
        _set_limit(limit)
    report = report_cache()
    if json_output:
        stdout.file.write(json.dumps(msgspec.to_builtins(report, enc_hook=str)) + "\n")
        return
    _show(report)


def clear(json_output: JsonOption = False) -> None:
    """Remove all of it that no running worker uses."""
    freed_bytes = clear_cache()
    kept_bytes = PieceStore(pieces_dir()).used_bytes()
    if json_output:
        stdout.file.write(json.dumps({"freed_bytes": freed_bytes, "kept_bytes": kept_bytes}) + "\n")
        return
    stdout.print(f"{format_bytes(freed_bytes)} freed", highlight=False)
    if kept_bytes:
        stderr.print(f"{format_bytes(kept_bytes)} are in use by running workers, and stay.")


def _set_limit(text: str) -> None:
    limit_bytes = None if text.strip().lower() == _NO_LIMIT else parse_bytes(text)
    if limit_bytes is not None and limit_bytes < 1:
        raise ConfigError(
            f"the cache can't be limited to {text}", hint="potluck cache clear empties it; --limit none lifts a limit"
        )
    write_limit(pieces_dir(), limit_bytes)
    freed_bytes = PieceStore(pieces_dir()).trim()
    if freed_bytes:
        stderr.print(f"{format_bytes(freed_bytes)} freed", highlight=False)


def _show(report: CacheReport) -> None:
    allowed = "no limit" if report.limit_bytes is None else f"limit {format_bytes(report.limit_bytes)}"
    stdout.print(
        f"{format_bytes(report.used_bytes)} in {escape(str(report.folder))} ({allowed}; "
        f"{format_bytes(report.free_bytes)} free)",
        highlight=False,
        soft_wrap=True,
    )
    if not report.models:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in ("here", "of", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in report.models:
        share = f"{100 * model.held_bytes / model.total_bytes:.0f} %"
        table.add_row(escape(model.name), format_bytes(model.held_bytes), format_bytes(model.total_bytes), share)
    stdout.print(table)


cache_app = typer.Typer()
cache_app.callback(invoke_without_command=True)(cache)
cache_app.command("clear")(clear)
