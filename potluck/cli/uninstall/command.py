"""`potluck uninstall` shows what Potluck keeps on this host, and removes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from devices.pairing.known_pools import load_known_pools
from potluck.cli.options import JsonOption
from potluck.cli.running_processes import check_not_running
from potluck.cli.service.command import service_manager
from potluck.cli.terminal import show_line, show_table, stderr, stdout
from potluck.cli.uninstall.inventory import Inventory, Locations, Removed, remove, remove_if_empty, take_inventory
from potluck.cli.uninstall.rules import DOWNLOADS, HUB_PARTS, MODELS, PIECES, RUNTIME, SERVICE
from potluck.host.local_head import HeadFile
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.byte_sizes import format_bytes
from potluck.system.paths import config_file, home_dir, known_pools_file, runtime_path
from transport.errors import ConfigError, PotluckError

_SHOWN = 20
PACKAGE_HINT = "The program itself is removed with: pip uninstall potluck (or by deleting its virtual environment)"


def uninstall(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Leave models and their pieces.")] = False,
    hub_cache: Annotated[
        bool, typer.Option("--hub-cache", help="Also what was pulled into the Hugging Face hub's cache.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Remove everything that Potluck keeps on this host: models, logs, keys, settings, the service."""
    console = stderr if json_output else stdout
    places = _places()
    stays = (MODELS, DOWNLOADS, HUB_PARTS, PIECES) if keep_models else ()
    inventory = take_inventory(places)
    hub = [model for model in Store().list() if model.source.startswith("hf:")]
    _show(inventory, hub, stays=stays, hub_goes=hub_cache and not keep_models)
    if dry_run:
        _write(json_output, _facts(inventory, hub, stays, removed=None))
        return
    check_not_running(places.home)
    if not yes and (inventory.items or (hub and hub_cache)):
        _confirm()
    heads = _heads_that_know_this_host()
    with HeadFile():  # None starts meanwhile.
        if hub_cache and not keep_models:
            for model in hub:
                Store().remove(model.name)
        messages = service_manager().uninstall().messages if places.service is not None else ()
        removed = remove(take_inventory(places), stays=(*stays, SERVICE, RUNTIME))
    removed = _combined(removed, remove(take_inventory(places), stays=stays))
    remove_if_empty(places.runtime)
    for line in (
        *(f"Service: {line}" for line in messages),
        *heads,
        f"{_size(removed.num_bytes)} freed. {PACKAGE_HINT}",
    ):
        show_line(console, line, markup=False)
    _write(json_output, _facts(inventory, hub, stays, removed=removed))
    if removed.failed:
        path, why = removed.failed[0]
        raise PotluckError(
            f"{len(removed.failed)} of these could not be removed, {path} for one: {why}", hint="remove them by hand"
        )


def _places() -> Locations:
    from huggingface_hub.constants import HF_HUB_CACHE  # Its import takes a while.

    return Locations(
        home=home_dir(),
        runtime=runtime_path(),
        config=config_file(),
        service=service_manager().state().file,
        hub=Path(HF_HUB_CACHE),
    )


def _heads_that_know_this_host() -> list[str]:
    try:
        pools = load_known_pools(known_pools_file())
    except ConfigError:
        return []
    return [
        f"{pool.name} still knows this host, if it has not revoked it. On it: potluck revoke {pool.my_name}"
        for pool in pools
    ]


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is here to be asked", hint="say --yes to remove it, or --dry-run to see it")
    if not typer.confirm("Remove all this?", err=True):
        raise typer.Exit(1)


def _combined(first: Removed, rest: Removed) -> Removed:
    return Removed(
        items=(*first.items, *rest.items), num_bytes=first.num_bytes + rest.num_bytes, failed=first.failed + rest.failed
    )


def _show(inventory: Inventory, hub: list[StoredModel], *, stays: tuple[str, ...], hub_goes: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "size", "where"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "size" else "left")
    for kept in inventory.items:
        fate = "stays" if kept.kind in stays else "goes"
        table.add_row(fate, kept.title, _size(kept.num_bytes), escape(str(kept.folder)))
    for model in hub:
        fate = "goes" if hub_goes else "stays"
        table.add_row(fate, f"{model.name}, in the hub's cache", _size(model.num_bytes), escape(str(model.path)))
    if table.row_count:
        show_table(stderr, table)
    else:
        stderr.print("Potluck keeps nothing on this host.")
    if hub and not hub_goes:
        show_line(
            stderr, "The hub's cache is other programs' as well; --hub-cache removes what Potluck pulled into it."
        )
    _show_unknown(inventory.unknown)


def _size(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes >= 2**20 else f"{-(-num_bytes // 1024)} KiB"


def _show_unknown(unknown: tuple[Path, ...]) -> None:
    if not unknown:
        return
    stderr.print("Not Potluck's, or a link, and therefore left alone:")
    for path in unknown[:_SHOWN]:
        show_line(stderr, f"  {path}", markup=False)
    if len(unknown) > _SHOWN:
        stderr.print(f"  and {len(unknown) - _SHOWN} more")


def _facts(
    inventory: Inventory, hub: list[StoredModel], stays: tuple[str, ...], *, removed: Removed | None
) -> dict[str, Any]:
    """`removed` None: nothing was, it is a dry run."""
    failed = () if removed is None else removed.failed
    return {
        "dry_run": removed is None,
        "kept": [
            {
                "kind": kept.kind,
                "what": kept.title,
                "bytes": kept.num_bytes,
                "place": str(kept.folder),
                "paths": [str(path) for path in kept.paths],
                "goes": kept.kind not in stays,
            }
            for kept in inventory.items
        ],
        "hub_cache": [{"model": model.name, "bytes": model.num_bytes, "path": str(model.path)} for model in hub],
        "left_alone": [str(path) for path in inventory.unknown],
        "freed_bytes": 0 if removed is None else removed.num_bytes,
        "failed": [{"path": str(path), "why": why} for path, why in failed],
    }


def _write(json_output: bool, facts: dict[str, Any]) -> None:
    if json_output:
        stdout.file.write(json.dumps(facts) + "\n")
