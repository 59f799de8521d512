"""Disk space for pieces: the errors of a full disk, the user's limit, and what is evicted first."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from transport.errors import ConfigError, NoSpace, PotluckError
from transport.pieces.locks import open_part
from transport.process.files import write_atomic

MARGIN_BYTES = 32 << 20
"""Left free for whatever else the host writes."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO)


@contextmanager
def translate_write_errors(folder: Path) -> Iterator[None]:
    """Inside, an OSError of writing in `folder` becomes NoSpace, or a PotluckError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise no_space_error(folder, "the disk filled up while pieces of a model came in") from error
        if error.errno in _REFUSED:
            raise PotluckError(
                f"can't write pieces of models in {folder}: {error.strerror}",
                hint="see that you may write there, or set POTLUCK_HOME to another folder",
            ) from error
        raise


def free_bytes(folder: Path) -> int:
    """Of its disk, also if the folder itself is not there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def no_space_error(folder: Path, what: str) -> NoSpace:
    return NoSpace(
        f"{what}; {folder} has {format_mb(free_bytes(folder))} free",
        hint="free some space (potluck cache shows what pieces of models take, potluck cache clear removes them), or "
        "set POTLUCK_HOME to a folder on another disk",
    )


def format_mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


_LIMIT_FILE = "limit.json"


class _Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit_bytes: int | None


def read_limit(root: Path) -> int | None:
    """None without a limit. Raises ConfigError for a file that can't be understood."""
    path = root / _LIMIT_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Limit).limit_bytes
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} can't be read: {error}", hint="set it again: potluck cache --limit 50GB") from error


def write_limit(root: Path, limit_bytes: int | None) -> None:
    with translate_write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(root / _LIMIT_FILE, msgspec.json.encode(_Limit(limit_bytes)), private=False)


_PIECE_FOLDER = re.compile(r"[0-9a-f]{2}")
_PIECE_FILE = re.compile(r"([0-9a-f]{64})\.(piece|part)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceFile:
    """A whole piece, or one that is coming in. `used_ns` is when it was last leased or written."""

    path: Path
    digest: str
    is_whole: bool
    num_bytes: int
    used_ns: int


def stored_files(root: Path) -> list[PieceFile]:
    found: list[PieceFile] = []
    for folder in _entries(root):
        for entry in _entries(Path(folder.path)) if _PIECE_FOLDER.fullmatch(folder.name) else ():
            match = _PIECE_FILE.fullmatch(entry.name)
            if match is None:
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # Another process has evicted or finished it.
            found.append(
                PieceFile(
                    path=Path(entry.path),
                    digest=match[1],
                    is_whole=match[2] == "piece",
                    num_bytes=status.st_size,
                    used_ns=status.st_mtime_ns,
                )
            )
    return found


def whole_digests(root: Path) -> set[str]:
    """Their digests."""
    found: set[str] = set()
    for folder in _entries(root):
        if _PIECE_FOLDER.fullmatch(folder.name):
            names = (entry.name for entry in _entries(Path(folder.path)))
            found.update(name.removesuffix(".piece") for name in names if name.endswith(".piece"))
    return found


def evictable(files: Sequence[PieceFile], leased: Container[str]) -> list[PieceFile]:
    """What may go, in the order in which it goes."""
    return sorted((file for file in files if file.digest not in leased), key=lambda file: file.used_ns)


def evict(files: Sequence[PieceFile], at_least_bytes: int) -> int:
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
