"""Removing what was found, in the order in which being cut off does the least harm: folders last."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from potluck.leaving.inventory import Inventory, Kept, is_link


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """`failed`: what could not be removed, and why."""

    kept: tuple[Kept, ...]
    num_bytes: int
    failed: tuple[tuple[Path, str], ...]


def remove(inventory: Inventory, *, stays: Collection[str] = ()) -> Removed:
    """Remove everything found but the kinds that stay; goes on past what can't be removed.

    Links are never followed: one that was put in a path's place since it was found is not entered.
    """
    failed: list[tuple[Path, str]] = []
    num_bytes = 0
    chosen = tuple(kept for kept in inventory.kept if kept.kind not in stays)
    for kept in chosen:
        before = len(failed)
        for path in kept.paths:
            try:
                _remove_one(path)
            except OSError as error:
                failed.append((path, error.strerror or str(error)))
        num_bytes += kept.num_bytes if len(failed) == before else 0
    for folder in inventory.folders:
        remove_if_empty(folder)
    return Removed(kept=chosen, num_bytes=num_bytes, failed=tuple(failed))


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if not is_link(folder):
            folder.rmdir()


def _remove_one(path: Path) -> None:
    try:
        if path.is_dir() and not is_link(path):
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return  # Somebody else did.
