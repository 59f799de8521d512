"""More than twelve devices that all differ: a heuristic, around the exact search of twelve.

Start with the twelve fastest that hold the model (the largest take the place of the slowest until they do). Search them
exactly. Then let each device that was not looked at take the place of one that was not used (or of the one used least),
and search again, until none brings anything. Never worse than its first twelve.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.cost import CostModel, Objective
from planner.exact import Solution, solve_exactly
from planner.memory import available_bytes
from planner.problem import device_classes, whole_pool
from planner.relaxation import MAX_EXACT_STATES, SearchProgress


def find_best_ring(
    costs: CostModel,
    objective: Objective,
    progress: SearchProgress | None = None,
    devices: tuple[int, ...] | None = None,
) -> Solution | None:
    """The best ring of all or of the given devices; exact where they allow it."""
    limits = whole_pool(costs)
    if devices is not None:
        limits = replace(limits, devices=devices)
    if _num_states(costs, limits.devices) <= MAX_EXACT_STATES:
        return solve_exactly(costs, objective, limits, progress=progress)
    chosen = _first_choice(costs, limits.devices)
    best = _solve_subset(costs, objective, chosen, progress)
    waiting = [device for device in _by_speed(costs, limits.devices) if device not in chosen]
    while waiting:
        used = {placed.device for placed in best.assignment} if best else set()
        free = [device for device in chosen if device not in used]
        size = max(1, len(free)) if best else 1
        trial, waiting = waiting[:size], waiting[size:]
        kept = sorted(used, key=lambda device: _num_layers(best, device), reverse=True) if best else list(chosen[:-1])
        candidates = _searchable_prefix([*trial, *kept], costs)
        found = _solve_subset(costs, objective, candidates, progress)
        if found is not None and (best is None or found.objective_s < best.objective_s):
            best = found
        chosen = candidates
    return replace(best, is_exact=False) if best else None


def _solve_subset(
    costs: CostModel, objective: Objective, devices: tuple[int, ...], progress: SearchProgress | None
) -> Solution | None:
    return solve_exactly(
        costs, objective, replace(whole_pool(costs), devices=tuple(sorted(devices))), progress=progress
    )


def _num_states(costs: CostModel, devices: tuple[int, ...]) -> int:
    classes = device_classes(costs, replace(whole_pool(costs), devices=devices))
    return int(np.prod([len(members) + 1 for members in classes], dtype=np.float64))


def _by_speed(costs: CostModel, devices: tuple[int, ...]) -> list[int]:
    num_layers = costs.profile.num_layers
    return sorted(devices, key=lambda device: costs.decode(device, 1).span_s(0, num_layers))


def _searchable_prefix(devices: list[int], costs: CostModel) -> tuple[int, ...]:
    """As many of them, from the first, as can be searched exactly."""
    kept: tuple[int, ...] = ()
    for device in devices:
        if _num_states(costs, (*kept, device)) > MAX_EXACT_STATES:
            break
        kept = (*kept, device)
    return kept


def _first_choice(costs: CostModel, devices: tuple[int, ...]) -> tuple[int, ...]:
    by_speed = _by_speed(costs, devices)
    chosen = list(_searchable_prefix(by_speed, costs))
    by_size = sorted(by_speed, key=costs.free_bytes, reverse=True)
    needed = costs.memory_bytes(by_speed[0], 0, costs.profile.num_layers)
    for large in by_size:
        if available_bytes([costs.pool.devices[device].device for device in chosen]) >= needed * 1.1:
            break
        if large not in chosen:
            chosen = [*chosen[:-1], large] if chosen else [large]
            chosen.sort(key=by_speed.index)
    return tuple(chosen)


def _num_layers(solution: Solution | None, device: int) -> int:
    assignment = solution.assignment if solution else ()
    return sum(placed.last - placed.first for placed in assignment if placed.device == device)
