"""Layers by hand, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from planner.asked import LayerCounts
from planner.cost import CostModel
from planner.evaluate import Assignment, Placed, pool_bytes
from planner.forms import OPTION_OF, smaller
from transport.errors import ConfigError, DoesNotFit

GIB = 2**30


def place_by_hand(costs: CostModel, counts: LayerCounts) -> Assignment:
    """Raises ConfigError for counts that contradict the model or the pool, DoesNotFit where memory does not suffice."""
    names = [times.device.name for times in costs.pool.devices]
    profile = costs.profile
    for name, _ in counts:
        if name not in names:
            raise ConfigError(f"--layers names {name}, which is not in the pool", hint=f"it has: {', '.join(names)}")
    total = sum(count for _, count in counts)
    if total != profile.num_layers:
        raise ConfigError(
            f"--layers places {total} layers; {profile.name} has {profile.num_layers}",
            hint=f"{abs(profile.num_layers - total)} too {'many' if total > profile.num_layers else 'few'}",
        )
    placed: list[Placed] = []
    first = 0
    for name, count in counts:
        placed.append(Placed(names.index(name), first, first + count))
        first += count
        if first < profile.num_layers and first not in profile.legal_cuts:
            raise ConfigError(
                f"{profile.name} can't be cut after {first} layers: those around it share state",
                hint=f"it can be cut after: {', '.join(map(str, profile.legal_cuts)) or 'none'}",
            )
    _check_memory(costs, placed)
    _check_links(costs, placed)
    return tuple(placed)


def _check_memory(costs: CostModel, placed: Sequence[Placed]) -> None:
    """Raises DoesNotFit for the first of `_too_much`."""
    for name, needed, have in _too_much(costs, placed):
        hint = "give it fewer layers, lower --context or the number of conversations"
        for form in smaller(costs.profile):
            if not any(_too_much(CostModel(form, costs.pool, costs.workload, costs.wire_dtype), placed)):
                hint = f"--quantize {OPTION_OF[form.weights]} would fit; or {hint}"
                break
        raise DoesNotFit(
            f"{name}: these layers need {needed / GIB:.2f} GiB, {(needed - have) / GIB:.2f} GiB more than the "
            f"{have / GIB:.2f} GiB there are",
            hint=hint,
        )


def _too_much(costs: CostModel, placed: Sequence[Placed]) -> Iterator[tuple[str, int, int]]:
    """Who would need more memory than there is: name, bytes needed, bytes there."""
    for stage in placed:
        needed = costs.memory_bytes(stage.device, stage.first, stage.last)
        if needed > costs.free_bytes(stage.device):
            yield costs.name(stage.device), needed, costs.free_bytes(stage.device)
    used = pool_bytes(costs, tuple(placed))
    for pool, total in costs.pool_total_bytes.items():
        if used[pool] > total:
            members = [costs.name(stage.device) for stage in placed if costs.pool_of[stage.device] == pool]
            yield f"{' and '.join(members)} together", used[pool], total


def _check_links(costs: CostModel, placed: Sequence[Placed]) -> None:
    devices = [stage.device for stage in placed]
    for source, target in zip([None, *devices], [*devices, None], strict=True):
        if costs.link(source, target) is None:
            raise ConfigError(
                f"no link from {costs.host(source)} to {costs.host(target)} was measured",
                hint="choose another order of devices in --layers",
            )
