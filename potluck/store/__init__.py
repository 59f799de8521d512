"""The models of this host: where they came from, where they lie, what they are."""

from potluck.store.manifest import StoredFile, StoredModel
from potluck.store.progress import Progress, PullProgress
from potluck.store.store import Store

__all__ = ["Progress", "PullProgress", "Store", "StoredFile", "StoredModel"]
