"""The models of this host: where they came from, where they lie, what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potluck.store.progress import ProgressCallback, PullProgress

if TYPE_CHECKING:
    from potluck.store.manifest import StoredFile, StoredModel
    from potluck.store.store import Store

__all__ = ["ProgressCallback", "PullProgress", "Store", "StoredFile", "StoredModel"]


def __getattr__(name: str) -> Any:
    """The store itself when it is used: who only says how far a download is does not wait for what that imports."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from potluck.store import manifest, store

    return getattr(store if name == "Store" else manifest, name)
