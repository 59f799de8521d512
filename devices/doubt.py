"""When to trust a measurement that other programs may have disturbed: it is kept, and taken again some other time."""

from __future__ import annotations

BUSY_SHARE = 0.15
"""Other programs that had more of the cores' time than this may have made what was measured slower."""

_AGAIN_AFTER_S = 600.0
"""Before that they are probably still there."""

_MOST_TRIES = 3
"""Where it is never quiet, times with what is always there are the true ones."""


def is_disturbed(others_share: float) -> bool:
    return others_share > BUSY_SHARE


def is_due(kept_s: float, num_tries: int, now_s: float) -> bool:
    """Whether a disturbed measurement of `kept_s` (seconds since 1970) is to be taken again now."""
    return num_tries < _MOST_TRIES and not 0 <= now_s - kept_s < _AGAIN_AFTER_S
