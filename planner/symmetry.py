"""Which devices are interchangeable: a search that knows it visits each kind of ring once."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from planner.cost import CostModel, Floats
from planner.limits import SearchLimits


def hop_matrix(costs: CostModel, limits: SearchLimits, tokens: int) -> Floats:
    """hop[i, j] seconds between the i-th and j-th of the limits' devices; the last row and column are the engine."""
    ends: list[int | None] = [*limits.devices, None]
    hops = np.array([[costs.hop_s(source, target, tokens) for target in ends] for source in ends])
    place = {device: index for index, device in enumerate(limits.devices)}
    for source, target in limits.forbidden:
        if source in place and target in place:
            hops[place[source], place[target]] = np.inf
    return hops


def classes_of(costs: CostModel, limits: SearchLimits) -> tuple[tuple[int, ...], ...]:
    """The limits' devices in classes: swapping two of a class changes neither times, memory nor links."""
    hops = hop_matrix(costs, limits, 1)
    place = {device: index for index, device in enumerate(limits.devices)}
    by_likeness: dict[object, list[list[int]]] = defaultdict(list)
    on_host = Counter(costs.host(device) for device in limits.devices)
    for device in limits.devices:
        classes = by_likeness[_likeness(costs, limits, device, on_host)]
        for members in classes:
            if all(_swappable(hops, place[device], place[member]) for member in members):
                members.append(device)
                break
        else:
            classes.append([device])
    found = [tuple(members) for classes in by_likeness.values() for members in classes]
    return tuple(sorted(found))


def _likeness(costs: CostModel, limits: SearchLimits, device: int, on_host: Counter[str]) -> object:
    times = costs.pool.devices[device]
    pool, host = costs.pool_of[device], costs.host(device)
    is_alone = on_host[host] == 1 and not any(host in pair for pairs in costs.pool.shared_links for pair in pairs)
    return (
        (times.kinds, times.layers, times.embed, times.head, times.step_s, times.busy),
        (times.device.compute_dtype, limits.free_bytes[device], device in limits.required),
        None if costs.pool_sizes[pool] == 1 else pool,
        None if is_alone else host,
    )


def _swappable(hops: Floats, one: int, other: int) -> bool:
    order = np.arange(len(hops))
    order[[one, other]] = other, one
    return bool(np.array_equal(hops[np.ix_(order, order)], hops))
