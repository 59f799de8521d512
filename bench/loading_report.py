"""What `bench.loading` found, as shares and against its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Functions of the loader that do not call one another, and what they do. The rest is `other`.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "reading files": ("read_exactly",),
    "unpacking bits": ("unpack_stream", "unpack_words"),
    "packing for the kernels": ("pack_rows",),
    "choosing offsets": ("best_numbers",),
    "checking numbers": ("fits_float16",),
}
MOST_MEMORY = 1.15
LEAST_BANDWIDTH = 0.6


def parts_of(spent_s: Mapping[str, float], total_s: float) -> dict[str, Any]:
    """Shares of a load's time, from cumulative seconds by function."""
    seconds = {part: sum(spent_s.get(name, 0.0) for name in names) for part, names in _PARTS.items()}
    seconds["other"] = total_s - sum(seconds.values())
    return {
        "total_s": round(total_s, 2),
        "shares": {part: round(value / total_s, 3) for part, value in seconds.items()},
    }


def verdicts(peak_over_stage: float, share_of_bandwidth: float) -> list[dict[str, Any]]:
    return [
        {
            "what": "anonymous peak while loading, over the stage's size",
            "value": round(peak_over_stage, 3),
            "at most": MOST_MEMORY,
            "met": peak_over_stage <= MOST_MEMORY,
        },
        {
            "what": "bytes a token reads over its time, as a share of the memory's bandwidth",
            "value": round(share_of_bandwidth, 3),
            "at least": LEAST_BANDWIDTH,
            "met": share_of_bandwidth >= LEAST_BANDWIDTH,
        },
    ]
