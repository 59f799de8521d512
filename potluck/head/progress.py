"""Head progress is how a starting head reports what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from potluck.store.sources import ProgressCallback as PullCallback
from potluck.store.sources import ignore_progress

if TYPE_CHECKING:
    from devices.pairing.pake import Code, Invite
    from potluck.head.pool import PoolWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadProgress:
    """`say` a line (rich markup); `measuring(device, what)` what a device is being measured for; `loading` draws the
    loading of the stages, often; `show_invitation` how other hosts join; `pulling` how far a download is."""

    say: Callable[[str], None]
    measuring: Callable[[str, str], None]
    loading: Callable[[Sequence[PoolWorker]], None]
    show_invitation: Callable[[Invite, Code], None] = lambda invite, code: None
    pulling: PullCallback = ignore_progress
