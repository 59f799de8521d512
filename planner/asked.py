"""What a user may ask of the planner. Imports nothing of what answers it."""

from __future__ import annotations

from typing import Literal, get_args

from transport.errors import ConfigError

Strategy = Literal["auto", "latency", "throughput", "proportional", "memory", "even"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

LayerCounts = tuple[tuple[str, int], ...]


def parse_layers(text: str) -> LayerCounts:
    """Layers by hand: "mac=20,gpu=12", in ring order. Raises ConfigError."""
    counts: list[tuple[str, int]] = []
    for part in text.split(","):
        name, _, count = part.strip().rpartition("=")
        if not name or not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"{part.strip()!r} says no number of layers", hint='write --layers as "mac=20,gpu=12"')
        counts.append((name, int(count)))
    names = [name for name, _ in counts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice in {text!r}", hint="a device has one run of layers")
    return tuple(counts)
