"""What a store of pieces has on the disk, and which of it goes first."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from transport.pieces.part_file import open_part

_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"([0-9a-f]{64})\.(piece|part)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A whole piece, or one that is coming in. `used_ns` is when it was last leased or written."""

    path: Path
    digest: str
    is_whole: bool
    num_bytes: int
    used_ns: int


def stored_files(root: Path) -> list[StoredFile]:
    found: list[StoredFile] = []
    for folder in _entries(root):
        for entry in _entries(Path(folder.path)) if _FOLDER.fullmatch(folder.name) else ():
            match = _FILE.fullmatch(entry.name)
            if match is None:
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # Another process has evicted or finished it.
            found.append(
                StoredFile(
                    path=Path(entry.path),
                    digest=match[1],
                    is_whole=match[2] == "piece",
                    num_bytes=status.st_size,
                    used_ns=status.st_mtime_ns,
                )
            )
    return found


def whole_pieces(root: Path) -> set[str]:
    """Their digests."""
    found: set[str] = set()
    for folder in _entries(root):
        if _FOLDER.fullmatch(folder.name):
            names = (entry.name for entry in _entries(Path(folder.path)))
            found.update(name.removesuffix(".piece") for name in names if name.endswith(".piece"))
    return found


def evictable(files: Sequence[StoredFile], leased: Container[str]) -> list[StoredFile]:
    """What may go, in the order in which it goes."""
    return sorted((file for file in files if file.digest not in leased), key=lambda file: file.used_ns)


def evict(files: Sequence[StoredFile], at_least_bytes: int) -> int:
    """Remove files, in order, until so many bytes are freed, or all are gone; the bytes freed."""
    freed = 0
    for file in files:
        if freed >= at_least_bytes:
            break
        if file.is_whole:
            try:
                file.path.unlink(missing_ok=True)
            except PermissionError:  # Windows, while somebody reads it.
                continue
        elif not _remove_part(file.path):
            continue
        freed += file.num_bytes
    return freed


def _remove_part(path: Path) -> bool:
    """False if it is coming in right now."""
    try:
        part = open_part(path, create=False)
    except FileNotFoundError:
        return True
    if part is None:
        return False
    part.remove()
    return True


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
