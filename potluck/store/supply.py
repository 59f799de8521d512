"""Where a pull may take bytes from besides the internet, and whether it may ask the internet at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_TRUE = ("1", "ON", "YES", "TRUE")


class PeerFiles(Protocol):
    """Whole files that other hosts of the pool have, by their SHA-256. Several threads may call at once; what comes is
    checked by who asks."""

    def holds(self, sha256: str) -> bool: ...

    def read(self, sha256: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from `offset` on. Raises PotluckError when that can't be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """`copies` gives files of this store, wherever they lie, that should have that SHA-256."""

    is_offline: bool
    peers: PeerFiles | None
    copies: Callable[[str], list[Path]]


def offline_by_environment() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as the hub's client reads it) says so."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _TRUE
