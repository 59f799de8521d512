"""What was measured of devices and links, for one model: the planner's inputs, as plain data.

Times are of real layers of the model in the precision that the device computes in, through the stage's own code.
`shard` and `devices` measure them, `potluck` puts them together, nothing is looked up in a table of chips.
"""

from __future__ import annotations

from dataclasses import dataclass

from devices.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """seconds[i][j] at rows[i] (sequences of a decode step, or tokens of a prefill chunk) and contexts[j] (tokens of
    KV before it). Both axes ascend. Between points times are bilinear; beyond them they go on with the last slope."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """One kind of layer (layers of a kind have the same shapes, window and experts): seconds of one such layer."""

    decode: Grid
    prefill: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """One model on one device. `kinds[i]` is the kind of layer i, an index into `layers`.

    `embed` and `head` are seconds by number of rows (contexts is (0,)); the head is norm, projection and sampling.
    `step_s` is what any step costs a stage besides its layers: entering and leaving the backend, ops, checks.
    `busy` tells how much slower this device gets while all the others of its shared resource work as well
    (1.0: not at all).
    """

    device: Device
    kinds: tuple[int, ...]
    layers: tuple[LayerTimes, ...]
    embed: Grid
    head: Grid
    step_s: float
    busy: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimes:
    """An ordered pair of hosts (or a host and itself), one way on a warm connection of the real transport.

    `hop_s` is the median time from one stage's result to the next one's start for a decode-sized message, software
    included; `hop_p95_s` its 95th percentile; `bytes_per_s` the rate of large messages.
    """

    source: str
    target: str
    hop_s: float
    hop_p95_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTimes:
    """Everything that a plan is made from. `head` is the host of the engine.

    A missing pair of hosts in `links` can't be used. `shared_links` are groups of ordered pairs that share a medium
    (Wi-Fi air, a NIC's one direction): their transfer times add up.
    """

    head: str
    devices: tuple[DeviceTimes, ...]
    links: tuple[LinkTimes, ...]
    shared_links: tuple[tuple[tuple[str, str], ...], ...] = ()
