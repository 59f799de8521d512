"""Messages between the head and its workers; ControlMessage is all that crosses control sockets."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from transport.errors import ErrorInfo
from transport.messages.measure import EndProfile, MeasureReply, MeasureRequest, ProfileProgress
from transport.messages.pool import (
    HostReply,
    HostRequest,
    MembersChanged,
    NodeAccepted,
    NodeHello,
    OfferProgress,
    ProbeConnection,
    ProbeResult,
    SharedModel,
)
from transport.messages.ring import DType, Fence, StageSpec


class Register(Struct, frozen=True, tag="register", kw_only=True):
    """A worker offers its device. `free_bytes` is what it may take, after the owner's cap; devices that share memory
    have the same `memory_pool`; `bandwidth_bytes_per_s` is that of a matrix-vector product in `compute_dtype`.
    `address` is where other hosts reach this one; None: only processes of this host can. `machine` is what times
    measured there depend on besides the device: hardware, limits, library versions."""

    version: int
    device: str
    backend: Literal["torch", "mlx"]
    kind: str
    host: str
    pid: int
    threads: int
    free_bytes: int
    total_bytes: int
    memory_pool: str
    bandwidth_bytes_per_s: float
    compute_dtype: DType
    address: str | None = None
    machine: str = ""


class Load(Struct, frozen=True, tag="load", kw_only=True):
    """Listen, answer `Listening`, load the layers of `spec` from the model in folder `model_path`, wait for `Connect`.
    On another host than the head's, `shared` says where the model is to be had.

    `listen` says from where the stage before connects: from this host ("local") or another one ("network"), and then
    only whoever has the key `upstream`."""

    fence: Fence
    stage: int
    spec: StageSpec
    model_path: str
    max_step_tokens: int
    listen: Literal["local", "network"]
    upstream: str = ""
    shared: SharedModel | None = None


class Listening(Struct, frozen=True, tag="listening"):
    """The worker listens at `endpoint` for the stage before its own."""

    fence: Fence
    endpoint: str


class Connect(Struct, frozen=True, tag="connect"):
    """Send what the stage gives to `next`: where the stage after it, or the engine, listens. `key` is its key if that
    is on another host."""

    fence: Fence
    next: str
    key: str = ""


class Unload(Struct, frozen=True, tag="unload"):
    """Close the stage's sockets and free its weights and KV; stay for the next `Load`."""

    fence: Fence


class Loading(Struct, frozen=True, tag="loading"):
    """Bytes received from other hosts ("fetch"), then read from the disk ("read")."""

    fence: Fence
    read_bytes: int
    total_bytes: int
    phase: Literal["fetch", "read"] = "read"


class Loaded(Struct, frozen=True, tag="loaded"):
    """The stage is loaded and connected. `fetched` is how many bytes came from which host, by name, and `fetch_s` how
    long that took."""

    fence: Fence
    weights_bytes: int
    kv_bytes: int
    load_s: float
    fetch_s: float = 0.0
    fetched: dict[str, int] = {}


class WorkerFault(Struct, frozen=True, tag="worker_fault"):
    """The worker could not load what was asked, or can't go on serving it. It is ready for another `Load`."""

    fence: Fence
    error: ErrorInfo


class StatsRequest(Struct, frozen=True, tag="stats_request"):
    token: int


class DecodeBucket(Struct, frozen=True, kw_only=True):
    """Decode steps of more than half of, and at most `largest_rows` sequences (a power of two), added up: their number,
    sequences, tokens of context and compute seconds."""

    largest_rows: int
    steps: int
    rows: int
    context_tokens: int
    seconds: float


class Stats(Struct, frozen=True, tag="stats", kw_only=True):
    """Counters since the last `Load`. Compute seconds are inside the stage; decode steps have one token an entry."""

    token: int
    rss_bytes: int
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    decode_p50_s: float = 0.0
    decode_buckets: tuple[DecodeBucket, ...] = ()
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    sequences: int = 0
    kv_tokens: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0


class Heartbeat(Struct, frozen=True, tag="alive"):
    """A worker's sign of life, once a second; the head gives up on a worker that is silent for several."""


class Stop(Struct, frozen=True, tag="stop"):
    """Leave: release everything and exit."""

    reason: str = ""


ControlMessage = (
    NodeHello
    | NodeAccepted
    | MembersChanged
    | ProbeConnection
    | ProbeResult
    | Register
    | Load
    | Listening
    | Connect
    | Unload
    | Loading
    | Loaded
    | WorkerFault
    | StatsRequest
    | Stats
    | Heartbeat
    | Stop
    | HostRequest
    | HostReply
    | OfferProgress
    | MeasureRequest
    | MeasureReply
    | ProfileProgress
    | EndProfile
)
