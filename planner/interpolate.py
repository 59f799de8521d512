"""Seconds between measured points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from planner.measured import Grid


def seconds_at(grid: Grid, rows: float, context: float) -> float:
    """Bilinear between points, with the last slope beyond them, constant along an axis of one point; never negative."""
    low, high, part = _between(grid.rows, rows)
    return max(0.0, (1 - part) * _along(grid, low, context) + part * _along(grid, high, context))


def _along(grid: Grid, row: int, context: float) -> float:
    low, high, part = _between(grid.contexts, context)
    seconds = grid.seconds[row]
    return (1 - part) * seconds[low] + part * seconds[high]


def _between(points: Sequence[int], value: float) -> tuple[int, int, float]:
    """The two points that a value is interpolated from, and its part of the way; outside of 0 … 1 beyond them."""
    if len(points) == 1:
        return 0, 0, 0.0
    low = min(max(bisect_right(points, value) - 1, 0), len(points) - 2)
    return low, low + 1, (value - points[low]) / (points[low + 1] - points[low])
