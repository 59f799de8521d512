"""Who gets what from whom when several hosts load at once: what two or more of them need leaves the head only once.

Pure. Every such piece is taken from the head by one host, and from that one by the others (`PieceHint`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from transport.messages.pool import PieceHint


def assign_pieces(needs: Mapping[str, Sequence[int]], sizes: Sequence[int]) -> dict[str, tuple[PieceHint, ...]]:
    """`needs` are the numbers of the pieces that each host lacks, by its key; `sizes[i]` is what piece i has, in bytes.

    Hints for each host, in the order of the pieces. What each takes from the head is balanced by bytes, as far as what
    only it needs allows; the pieces that one takes for others lie together.
    """
    takers = _assign_fetchers(needs, sizes)
    return {host: _hints(host, sorted(set(needs[host])), takers) for host in needs}


def _assign_fetchers(needs: Mapping[str, Sequence[int]], sizes: Sequence[int]) -> dict[int, str]:
    """Who takes each piece from the head."""
    needers: dict[int, list[str]] = defaultdict(list)
    for host in sorted(needs):
        for index in set(needs[host]):
            needers[index].append(host)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index in sorted(needers):
        groups[tuple(needers[index])].append(index)
    load_bytes = dict.fromkeys(needs, 0)
    takers: dict[int, str] = {}
    # Those with the least choice first: others can even out what they leave.
    for hosts, indexes in sorted(groups.items(), key=lambda group: (len(group[0]), group[1][0])):
        quotas = _balanced_quotas([load_bytes[host] for host in hosts], sum(sizes[index] for index in indexes))
        for index, number in zip(indexes, _fill_quotas([sizes[index] for index in indexes], quotas), strict=True):
            takers[index] = hosts[number]
            load_bytes[hosts[number]] += sizes[index]
    return takers


def _balanced_quotas(loads: Sequence[int], total: int) -> list[float]:
    """What to add to each load, `total` in all, so that those that get something end up equal."""
    ordered = sorted(loads)
    level = float(ordered[-1])
    for count in range(1, len(ordered) + 1):
        level = (sum(ordered[:count]) + total) / count
        if count == len(ordered) or level <= ordered[count]:
            break
    return [max(0.0, level - load) for load in loads]


def _fill_quotas(sizes: Sequence[int], quotas: Sequence[float]) -> list[int]:
    """For each size the number of the quota that it goes to: runs, in order, as near to the quotas as can be."""
    found: list[int] = []
    number, end, done = 0, quotas[0], 0.0
    for size in sizes:
        while number + 1 < len(quotas) and done + size / 2 > end:
            number += 1
            end += quotas[number]
        found.append(number)
        done += size
    return found


def _hints(host: str, indexes: Sequence[int], takers: Mapping[int, str]) -> tuple[PieceHint, ...]:
    """Ranges may span pieces that the host has no need of."""
    found: list[PieceHint] = []
    is_open = False
    for index in indexes:
        taker = takers[index]
        if taker == host:
            is_open = False
        elif is_open and found[-1].peer == taker:
            found[-1] = PieceHint(taker, found[-1].first, index + 1)
        else:
            found.append(PieceHint(taker, index, index + 1))
            is_open = True
    return tuple(found)
