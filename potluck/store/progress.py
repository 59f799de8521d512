"""How a pull tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PullStage = Literal["waiting", "download", "verify", "unpack", "ingest"]
STAGE_LABELS: dict[PullStage, str] = {
    "waiting": "waiting for another process that pulls it",
    "download": "downloading",
    "verify": "checking",
    "unpack": "unpacking",
    "ingest": "reading its header",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """`done` of `total` bytes (steps, for "ingest"); `total` None when nobody knows. "waiting": for another process.
    `says` is a line for people, once: what is about to come."""

    stage: PullStage
    done: int
    total: int | None
    says: str = ""


ProgressCallback = Callable[[PullProgress], None]


def ignore_progress(progress: PullProgress) -> None:
    """For callers that show nothing."""
