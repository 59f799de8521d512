"""Where the workers of a ring get its model from: this host's store, or another host of the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from potluck.borrowed_model import BorrowedModel
from potluck.lan import ThisHost
from potluck.model_share import ModelShare, OwnModel, PieceGiver
from potluck.pool import Pool, PoolWorker
from potluck.progress import HeadProgress
from potluck.ring import RingStage
from potluck.store import StoredModel
from potluck.wanted_model import WantedModel
from transport.pool_messages import SharedModel


class ModelSource(Protocol):
    """A model, and where its workers get it from."""

    def moved(self, here: ThisHost) -> None:
        """The head's host has another address."""

    def ready(self, say: Callable[[str], object], *, for_others: bool) -> StoredModel:
        """The model as it is to be loaded now; `for_others`: by workers of other hosts too. Raises PotluckError."""

    def for_worker(self, worker: PoolWorker) -> SharedModel | None:
        """For one that is to open it without its weights; None if it lies on the worker's host."""

    def for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        """For all that load it, by the stage's number, without those on whose host it lies."""


def find_model(
    model: StoredModel | WantedModel,
    *,
    here: ThisHost,
    giver: PieceGiver | None,
    pool: Pool,
    run_dir: Path,
    progress: HeadProgress,
) -> ModelSource:
    """For whichever workers there will be; `giver` is None where no other host can come. May wait long for a host that
    has the model.

    Raises ModelNotFound, DeadlineExceeded, and what a pull raises.
    """
    if isinstance(model, WantedModel):
        if giver is not None:
            borrowed = BorrowedModel(model, here, giver, pool, run_dir, say=progress.say)
            if borrowed.find():
                return borrowed
        if model.pull is None:
            raise model.missing
        model = model.pull(progress.pulling)
    return OwnModel(model) if giver is None else ModelShare(model, here, giver, pool)
