"""The inventory finds what Potluck keeps on this host, and removes it without following links."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from potluck.cli.uninstall.rules import (
    CONFIG,
    HOME_RULES,
    HUB_PARTS,
    HUB_PARTS_GLOB,
    RUNTIME_RULES,
    SERVICE,
    TITLES,
    Rule,
)
from transport.errors import ConfigError

_IO_REPARSE_TAG_MOUNT_POINT = 0xA0000003


@dataclass(frozen=True, slots=True, kw_only=True)
class Locations:
    """Where to look. `service` is None if none is installed; `hub` is the cache of the Hugging Face hub's tools."""

    home: Path
    runtime: Path
    config: Path
    service: Path | None
    hub: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryItem:
    """Everything of one kind, all of it below `place`. `paths` are files, and folders that are Potluck's with all that
    is in them."""

    kind: str
    folder: Path
    paths: tuple[Path, ...]
    num_bytes: int

    @property
    def title(self) -> str:
        return TITLES[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """`unknown` lies in Potluck's folders and is not Potluck's, or is a link: it stays. `folders` are Potluck's as far
    as they are empty once all else is gone, the deepest first."""

    items: tuple[InventoryItem, ...]
    unknown: tuple[Path, ...]
    folders: tuple[Path, ...]


def take_inventory(places: Locations) -> Inventory:
    """Raises ConfigError if POTLUCK_HOME or POTLUCK_RUNTIME is a folder that can't be Potluck's alone."""
    for folder, variable in ((places.home, "POTLUCK_HOME"), (places.runtime, "POTLUCK_RUNTIME")):
        check_own_folder(folder, variable)
    found: dict[str, list[tuple[Path, Path]]] = {}
    folders: list[Path] = []
    unknown: list[Path] = []
    for root, rules in ((places.home, HOME_RULES), (places.runtime, RUNTIME_RULES)):
        _scan(root, root, rules, found, folders, unknown, others=(places.config, places.runtime, places.service))
    for kind, file in ((CONFIG, places.config), (SERVICE, places.service)):
        if file is not None and (file.is_file() or file.is_symlink()):
            found[kind] = [(file.parent, file)]
    for path in sorted(places.hub.glob(HUB_PARTS_GLOB)):
        found.setdefault(HUB_PARTS, []).append((places.hub, path))
    if places.config.parent.name == "potluck":
        folders.append(places.config.parent)
    kept = [
        InventoryItem(
            kind=kind,
            folder=Path(os.path.commonpath([folder for folder, _ in found[kind]])),
            paths=tuple(path for _, path in found[kind]),
            num_bytes=sum(size_of(path) for _, path in found[kind]),
        )
        for kind in TITLES
        if kind in found
    ]
    deepest_first = sorted(set(folders), key=lambda folder: len(folder.parts), reverse=True)
    return Inventory(items=tuple(kept), unknown=tuple(unknown), folders=tuple(deepest_first))


def check_own_folder(folder: Path, variable: str) -> None:
    """Raises ConfigError for the root, the user's home, and what they lie in."""
    own, resolved = Path.home().resolve(), folder.resolve()
    if resolved == own or resolved in own.parents or resolved == Path(resolved.anchor):
        raise ConfigError(
            f"{variable} is {folder}, which can't be Potluck's own folder: nothing is removed",
            hint=f"set {variable} to the folder that Potluck was used with, or unset it",
        )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as nothing."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or is_link(path):
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    total = 0
    for folder, _, names in os.walk(path):  # Does not follow links.
        for name in names:
            inner = (Path(folder) / name).lstat()
            total += inner.st_size if stat.S_ISREG(inner.st_mode) else 0
    return total


def is_link(path: Path) -> bool:
    """Also a junction, which Windows has for folders."""
    status = path.lstat()
    return stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == _IO_REPARSE_TAG_MOUNT_POINT


def _scan(
    root: Path,
    folder: Path,
    rules: Sequence[Rule],
    found: dict[str, list[tuple[Path, Path]]],
    folders: list[Path],
    unknown: list[Path],
    others: Sequence[Path | None],
) -> None:
    """One folder of those that the rules are about, and those below it."""
    inside = folder.relative_to(root)
    here = [rule for rule in rules if _matches(inside, rule.folder)]
    for path in _entries(folder):
        is_folder = path.is_dir() and not is_link(path)
        rule = next((rule for rule in here if not is_link(path) and rule.matches(path, is_folder=is_folder)), None)
        if rule is not None:
            found.setdefault(rule.kind, []).append((folder, path))
        elif path in others or any(other is not None and path in other.parents for other in others):
            continue
        elif is_folder and any(_is_above(path.relative_to(root), rule.folder) for rule in rules):
            _scan(root, path, rules, found, folders, unknown, others)
        else:
            unknown.append(path)
    folders.append(folder)


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise ConfigError(f"{folder} can't be read: {error.strerror}", hint="see whom it belongs to") from error


def _matches(inside: Path, pattern: str) -> bool:
    parts = Path(pattern).parts
    return len(inside.parts) == len(parts) and _parts_match(inside.parts, parts)


def _is_above(inside: Path, pattern: str) -> bool:
    parts = Path(pattern).parts
    return len(inside.parts) <= len(parts) and _parts_match(inside.parts, parts)


def _parts_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(Path(name).match(pattern) for name, pattern in zip(names, patterns, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """`failed`: what could not be removed, and why."""

    items: tuple[InventoryItem, ...]
    num_bytes: int
    failed: tuple[tuple[Path, str], ...]


def remove(inventory: Inventory, *, stays: Collection[str] = ()) -> Removed:
    """Remove everything found but the kinds that stay; goes on past what can't be removed.

    Links are never followed: one that was put in a path's place since it was found is not entered.
    """
    failed: list[tuple[Path, str]] = []
    num_bytes = 0
    chosen = tuple(kept for kept in inventory.items if kept.kind not in stays)
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
    return Removed(items=chosen, num_bytes=num_bytes, failed=tuple(failed))


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
