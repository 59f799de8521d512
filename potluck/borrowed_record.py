"""Which model of another host a name meant the last time: enough to load it again while that host is away."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from pathlib import Path

import msgspec
from msgspec import Struct

from potluck.paths import shared_dir
from transport.pieces.store import is_digest

_FOLDER = "borrowed"


class BorrowedRecord(Struct, frozen=True, kw_only=True):
    """`digest` is the model's, `lender` and `key` are of the host that had it."""

    name: str
    digest: str
    lender: str
    key: str


def read_borrowed(name: str) -> BorrowedRecord | None:
    try:
        record = msgspec.json.decode(_path(name).read_bytes(), type=BorrowedRecord)
    except (OSError, msgspec.MsgspecError):
        return None
    return record if record.name == name and is_digest(record.digest) else None


def write_borrowed(record: BorrowedRecord) -> None:
    """Failing to only means that the host has to be there the next time."""
    path = _path(record.name)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".json.{secrets.token_hex(4)}")
        new.write_bytes(msgspec.json.encode(record))
        new.replace(path)


def forget_borrowed() -> None:
    """All whose models are not kept any more."""
    for path in (shared_dir() / _FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            record = msgspec.json.decode(path.read_bytes(), type=BorrowedRecord)
            if is_digest(record.digest) and not (shared_dir() / record.digest).is_dir():
                path.unlink()


def _path(name: str) -> Path:
    return shared_dir() / _FOLDER / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
