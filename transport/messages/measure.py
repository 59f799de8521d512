"""Messages between the head and its workers about what is measured before a ring is loaded."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from transport.errors import BadMessage, ErrorInfo
from transport.messages.pool import SharedModel
from transport.messages.ring import DType, Fence, WeightsForm


class Grid(Struct, frozen=True, kw_only=True):
    """seconds[i][j] at rows[i] (sequences of a decode step, or tokens of a prefill chunk) and contexts[j] (tokens of
    KV before it). Both axes ascend. Between points times are bilinear; beyond them they go on with the last slope."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def is_plausible(self) -> bool:
        """Whether it can be read at any point: ascending axes, a whole grid, no negative time."""
        axes = all(axis and list(axis) == sorted(set(axis)) for axis in (self.rows, self.contexts))
        shaped = len(self.seconds) == len(self.rows) and all(len(row) == len(self.contexts) for row in self.seconds)
        return axes and shaped and all(is_time(value) for row in self.seconds for value in row)


class LayerTimes(Struct, frozen=True, kw_only=True):
    """One kind of layer (layers of a kind have the same shapes, window and experts): seconds of one such layer."""

    decode: Grid
    prefill: Grid


class ProfileReport(Struct, frozen=True, kw_only=True):
    """`kinds[i]` is the kind of layer i. `step_s` is what a step costs besides its layers. `under_load_s` is a decode
    step of some layers over and over: of two profiles of devices that are alike, the lower one was disturbed less.
    `others_share` is the share of the host's processors that other programs had meanwhile."""

    kinds: tuple[int, ...]
    layers: tuple[LayerTimes, ...]
    embed: Grid
    lm_head: Grid
    step_s: float
    under_load_s: float
    others_share: float = 0.0

    def is_plausible(self) -> bool:
        """Whether it can be planned with."""
        grids = [self.embed, self.lm_head, *(grid for layer in self.layers for grid in (layer.decode, layer.prefill))]
        return (
            bool(self.kinds)
            and all(0 <= kind < len(self.layers) for kind in self.kinds)
            and all(grid.is_plausible() for grid in grids)
            and is_time(self.step_s)
            and self.under_load_s > 0
            and is_time(self.under_load_s)
            and 0 <= self.others_share <= 1
        )


def is_time(seconds: float) -> bool:
    return 0 <= seconds < float("inf")


def read_report(value: object) -> ProfileReport:
    """A report from plain data. Raises BadMessage for anything that can't be planned with."""
    try:
        return check_report(msgspec.convert(value, ProfileReport))
    except msgspec.ValidationError as error:
        raise BadMessage(f"a profile that can't be read: {error}") from error


def check_report(report: ProfileReport) -> ProfileReport:
    """The report. Raises BadMessage if it can't be planned with."""
    if not report.is_plausible():
        raise BadMessage(
            "a profile's times must be finite and ≥ 0, its grids whole and ascending", hint="measure again with --fresh"
        )
    return report


class Profile(Struct, frozen=True, tag="profile", kw_only=True):
    """Measure layers of a model (see `shard.worker.profile`); answered by `ProfileProgress` now and then, and
    `Profiled`."""

    token: int = 0
    model_path: str
    dtype: DType
    budget_s: float
    memory_bytes: int
    weights: WeightsForm = "stored"
    shared: SharedModel | None = None


class ProfileProgress(Struct, frozen=True, tag="doing"):
    """What is being measured now."""

    token: int
    what: str


class Profiled(Struct, frozen=True, tag="profiled"):
    """What was measured. The layers stay loaded until `EndProfile`, or until something else is to be done."""

    token: int
    report: ProfileReport


class MeasureUnderLoad(Struct, frozen=True, tag="steady", kw_only=True):
    """Run the profiled layers over and over for `seconds`, while other devices do so too; answered by
    `UnderLoadTime`."""

    token: int = 0
    seconds: float


class UnderLoadTime(Struct, frozen=True, tag="steady_time"):
    token: int
    step_s: float


class EndProfile(Struct, frozen=True, tag="end_profile"):
    """Free what the profile holds."""


class LinkShape(Struct, frozen=True, kw_only=True):
    """What crosses a link that is measured: hidden states as wide as the model's, `num_large` messages in a row."""

    fence: Fence
    hidden_size: int
    dtype: DType
    num_large: int


class LinkListen(Struct, frozen=True, tag="link_listen", kw_only=True):
    """Be one end of a link that is measured; answered by `LinkListening`. From the network only whoever has the key
    `upstream` comes in."""

    token: int = 0
    listen: Literal["local", "network"]
    shape: LinkShape
    upstream: str = ""


class LinkListening(Struct, frozen=True, tag="link_listening"):
    token: int
    endpoint: str


class LinkProbe(Struct, frozen=True, tag="link_probe", kw_only=True):
    """Both ends listen: exchange messages with the one at `next`. One of them leads; answered by `LinkProbed`."""

    token: int = 0
    next: str
    leads: bool
    key: str = ""


class LinkProbed(Struct, frozen=True, tag="link_probed", kw_only=True):
    """`bytes_per_s` came in. The one that leads has round trips, the other how long it held each message."""

    token: int = 0
    round_trips_s: tuple[float, ...]
    held_s: tuple[float, ...]
    bytes_per_s: float


class MeasureFault(Struct, frozen=True, tag="measure_fault"):
    """What was asked for could not be measured."""

    token: int
    error: ErrorInfo


MeasureRequest = Profile | MeasureUnderLoad | LinkListen | LinkProbe
MeasureReply = Profiled | UnderLoadTime | LinkListening | LinkProbed | MeasureFault
