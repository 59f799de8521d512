"""Messages between the head and its workers about what is measured before a ring is loaded."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from transport.errors import ErrorInfo
from transport.messages.pool import SharedModel
from transport.messages.ring import DType, Fence, WeightsForm


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
    """A ProfileReport in JSON. The layers stay loaded until `EndProfile`, or until something else is to be done."""

    token: int
    report: bytes


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
