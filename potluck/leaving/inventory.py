"""Looking for what Potluck keeps on this host: sizes, places, and what lies there that is not Potluck's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from potluck.leaving.rules import (
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
class Places:
    """Where to look. `service` is None if none is installed; `hub` is the cache of the Hugging Face hub's tools."""

    home: Path
    runtime: Path
    config: Path
    service: Path | None
    hub: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Everything of one kind, all of it below `place`. `paths` are files, and folders that are Potluck's with all that
    is in them."""

    kind: str
    place: Path
    paths: tuple[Path, ...]
    num_bytes: int

    @property
    def title(self) -> str:
        return TITLES[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """`strange` lies in Potluck's folders and is not Potluck's, or is a link: it stays. `folders` are Potluck's as far
    as they are empty once all else is gone, the deepest first."""

    kept: tuple[Kept, ...]
    strange: tuple[Path, ...]
    folders: tuple[Path, ...]


def take_inventory(places: Places) -> Inventory:
    """Raises ConfigError if POTLUCK_HOME or POTLUCK_RUNTIME is a folder that can't be Potluck's alone."""
    for folder, variable in ((places.home, "POTLUCK_HOME"), (places.runtime, "POTLUCK_RUNTIME")):
        refuse_common_folder(folder, variable)
    found: dict[str, list[tuple[Path, Path]]] = {}
    folders: list[Path] = []
    strange: list[Path] = []
    for root, rules in ((places.home, HOME_RULES), (places.runtime, RUNTIME_RULES)):
        _look(root, root, rules, found, folders, strange, others=(places.config, places.runtime, places.service))
    for kind, file in ((CONFIG, places.config), (SERVICE, places.service)):
        if file is not None and (file.is_file() or file.is_symlink()):
            found[kind] = [(file.parent, file)]
    for path in sorted(places.hub.glob(HUB_PARTS_GLOB)):
        found.setdefault(HUB_PARTS, []).append((places.hub, path))
    if places.config.parent.name == "potluck":
        folders.append(places.config.parent)
    kept = [
        Kept(
            kind=kind,
            place=Path(os.path.commonpath([folder for folder, _ in found[kind]])),
            paths=tuple(path for _, path in found[kind]),
            num_bytes=sum(size_of(path) for _, path in found[kind]),
        )
        for kind in TITLES
        if kind in found
    ]
    deepest_first = sorted(set(folders), key=lambda folder: len(folder.parts), reverse=True)
    return Inventory(kept=tuple(kept), strange=tuple(strange), folders=tuple(deepest_first))


def refuse_common_folder(folder: Path, variable: str) -> None:
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


def _look(
    root: Path,
    folder: Path,
    rules: Sequence[Rule],
    found: dict[str, list[tuple[Path, Path]]],
    folders: list[Path],
    strange: list[Path],
    others: Sequence[Path | None],
) -> None:
    """One folder of those that the rules are about, and those below it."""
    inside = folder.relative_to(root)
    here = [rule for rule in rules if _matches(inside, rule.folder)]
    for path in _entries(folder):
        is_folder = path.is_dir() and not is_link(path)
        rule = next((rule for rule in here if not is_link(path) and rule.knows(path, is_folder=is_folder)), None)
        if rule is not None:
            found.setdefault(rule.kind, []).append((folder, path))
        elif path in others or any(other is not None and path in other.parents for other in others):
            continue
        elif is_folder and any(_leads_to(path.relative_to(root), rule.folder) for rule in rules):
            _look(root, path, rules, found, folders, strange, others)
        else:
            strange.append(path)
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
    return len(inside.parts) == len(parts) and _fit(inside.parts, parts)


def _leads_to(inside: Path, pattern: str) -> bool:
    parts = Path(pattern).parts
    return len(inside.parts) <= len(parts) and _fit(inside.parts, parts)


def _fit(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(Path(name).match(pattern) for name, pattern in zip(names, patterns, strict=False))
