"""A disk that is too full, or that can't be written to, as an error that says what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transport.errors import NoSpace, PotluckError

MARGIN_BYTES = 32 << 20
"""Left free for whatever else the host writes."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO)


@contextmanager
def translated_write_errors(folder: Path) -> Iterator[None]:
    """Inside, an OSError of writing in `folder` becomes NoSpace, or a PotluckError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise no_space(folder, "the disk filled up while pieces of a model came in") from error
        if error.errno in _REFUSED:
            raise PotluckError(
                f"can't write pieces of models in {folder}: {error.strerror}",
                hint="see that you may write there, or set POTLUCK_HOME to another folder",
            ) from error
        raise


def free_bytes(folder: Path) -> int:
    """Of its disk, also if the folder itself is not there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def no_space(folder: Path, what: str) -> NoSpace:
    return NoSpace(
        f"{what}; {folder} has {mb(free_bytes(folder))} free",
        hint="free some space (potluck cache shows what pieces of models take, potluck cache clear removes them), or "
        "set POTLUCK_HOME to a folder on another disk",
    )


def mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
