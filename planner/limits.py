"""What a search may use: narrowed from the whole pool down to a node of a branch-and-bound tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from planner.cost import CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """`devices` may be used, `required` ones must be; each within `free_bytes` (by device number).

    `num_used` bounds (at least, at most) how many devices of a memory pool are used. `forbidden` hops go between two
    devices.
    """

    devices: tuple[int, ...]
    free_bytes: Mapping[int, int]
    required: frozenset[int] = frozenset()
    num_used: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    forbidden: frozenset[tuple[int, int]] = frozenset()

    def at_least(self, pool: str) -> int:
        return max(1, self.num_used[pool][0]) if pool in self.num_used else 1

    def with_free_bytes(self, device: int, num_bytes: int) -> SearchLimits:
        return replace(self, free_bytes={**self.free_bytes, device: min(num_bytes, self.free_bytes[device])})

    def with_num_used(self, pool: str, least: int, most: int) -> SearchLimits:
        before = self.num_used.get(pool, (0, most))
        return replace(self, num_used={**self.num_used, pool: (max(before[0], least), min(before[1], most))})

    def without_devices(self, devices: set[int]) -> SearchLimits:
        return replace(self, devices=tuple(device for device in self.devices if device not in devices))

    def without_hop(self, source: int, target: int) -> SearchLimits:
        return replace(self, forbidden=self.forbidden | {(source, target)})


def whole_pool(costs: CostModel, required: frozenset[int] = frozenset()) -> SearchLimits:
    devices = tuple(range(len(costs.pool.devices)))
    return SearchLimits(
        devices=devices, free_bytes={device: costs.free_bytes(device) for device in devices}, required=required
    )
