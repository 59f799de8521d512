"""Every message between processes, as a frozen tagged struct.

Data edges (ring): `Hello`, `Tokens` (engine → stage 0), `Hidden` (stage → stage), `Sampled` and `Failed` (→ engine).
Control (head ↔ worker): `Register` … `Stop`; head ↔ a host's node: `Arrive` … `Members`.
Client edge (HTTP ↔ engine): see `transport.requests`.
A message that carries a tensor is followed by one raw buffer; its size must equal what the header announces.
"""

from __future__ import annotations

from typing import Literal, NewType

from msgspec import Struct

PROTOCOL_VERSION = 5

SequenceId = NewType("SequenceId", int)
DType = Literal["float32", "float16", "bfloat16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

WeightsForm = Literal["stored", "dense", "4-bit", "8-bit"]
"""How a stage holds its matrices: as the file has them, quantized or not; all in the compute dtype; or what is not
quantized in the file quantized to so many bits."""

KVForm = Literal["full", "8-bit"]
"""How a stage holds KV: in its compute dtype, or in 8 bits with a scale for each head of each position."""


# Parts of a step.


class Sampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the last stage picks a token. Filters run in the order: penalties and bias, temperature, top-k, top-p, min-p.

    `temperature` 0 is greedy. `top_k` 0 and `min_p` 0 are off. Random numbers are keyed by (seed, choice, position).
    `top_logprobs` is how many alternatives to report, of the distribution before temperature and filters; None is
    no logprobs at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    choice: int = 0
    top_logprobs: int | None = None


class Open(Struct, frozen=True, tag="open", array_like=True):
    """Start a sequence. The prompt travels once, so that the last stage can derive penalties from the ids."""

    sequence: SequenceId
    prompt_ids: tuple[int, ...]
    sampling: Sampling


class Truncate(Struct, frozen=True, tag="truncate", array_like=True):
    """Forget the KV of positions ≥ `length`."""

    sequence: SequenceId
    length: int


class Release(Struct, frozen=True, tag="release", array_like=True):
    """Forget the sequence and its KV. Unknown sequences are ignored."""

    sequence: SequenceId


class Fork(Struct, frozen=True, tag="fork", array_like=True):
    """Give `sequence`, which is open and holds nothing yet, the KV of positions [0, length) of `source`.

    `moves`: the source is released by it, and nothing is copied.
    """

    sequence: SequenceId
    source: SequenceId
    length: int
    moves: bool = False


Op = Open | Fork | Truncate | Release


class Entry(Struct, frozen=True, array_like=True):
    """Token ids of one sequence at positions [start, start + len(token_ids)); `num_logits` of the last are sampled."""

    sequence: SequenceId
    start: int
    token_ids: tuple[int, ...]
    num_logits: int


class SampledToken(Struct, frozen=True, array_like=True):
    """One sampled id; `logprob` and `top` are None and empty unless the sequence asked for logprobs."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Result(Struct, frozen=True, array_like=True):
    """What an entry gave: `tokens[i]` is the token sampled for position `position + i`."""

    sequence: SequenceId
    position: int
    tokens: tuple[SampledToken, ...]


class Fence(Struct, frozen=True, array_like=True):
    """Which ring, which of its lives, and which plan a message belongs to. Anything else is dropped."""

    ring: str
    epoch: int
    plan: str


# Data edges.


class Hello(Struct, frozen=True, tag="hello", array_like=True):
    """First message on a data connection."""

    version: int
    fence: Fence
    sender: str


class Tokens(Struct, frozen=True, tag="tokens", array_like=True):
    """A step as the engine sends it to stage 0."""

    fence: Fence
    step: int
    ops: tuple[Op, ...]
    entries: tuple[Entry, ...]


class Hidden(Struct, frozen=True, tag="hidden", array_like=True):
    """A step between two stages; one buffer follows: [num_tokens, hidden_size] of `dtype`, bfloat16 as uint16 bits.

    `seconds` are what the stages so far have computed on it."""

    fence: Fence
    step: int
    ops: tuple[Op, ...]
    entries: tuple[Entry, ...]
    dtype: DType
    num_tokens: int
    hidden_size: int
    seconds: tuple[float, ...] = ()


class Sampled(Struct, frozen=True, tag="sampled", array_like=True):
    """A step's results. Sent for every step, also when no entry wanted logits: it is what frees the step's slot.

    `seconds[i]` is what stage i computed on it."""

    fence: Fence
    step: int
    results: tuple[Result, ...]
    seconds: tuple[float, ...] = ()


class Failed(Struct, frozen=True, tag="failed", array_like=True):
    """A stage could not run a step. Later stages apply the ops and pass this on; the engine ends its sequences."""

    fence: Fence
    step: int
    ops: tuple[Op, ...]
    stage: int
    code: str
    message: str
    hint: str = ""


DataMessage = Hello | Tokens | Hidden | Sampled | Failed


# Control: head ↔ a host's node. Keys are public CURVE keys in Z85, 40 characters.


class Arrive(Struct, frozen=True, tag="arrive", kw_only=True):
    """A host says that it is there, before its workers register. `potluck` is the version of the package, `platform`
    that of the system; `pieces` is where it gives pieces of models to members of the pool; `clock_s` is its time of
    day, in seconds since 1970."""

    version: int
    potluck: str
    platform: str
    address: str
    pieces: str
    is_wifi: bool = False
    clock_s: float = 0.0


class Welcome(Struct, frozen=True, tag="welcome", kw_only=True):
    """`name` is what the roster calls the host; `members` may take pieces from it; `pieces` and `clock_s` are the
    head's."""

    name: str
    pool: str
    members: tuple[str, ...]
    pieces: str = ""
    clock_s: float = 0.0


class Reach(Struct, frozen=True, tag="reach"):
    """A host asks the head to connect to `port` of the address that it arrived with, to see whether it can."""

    port: int


class Reached(Struct, frozen=True, tag="reached"):
    """`problem` is empty if the head could."""

    port: int
    problem: str


class Members(Struct, frozen=True, tag="members"):
    """The pool's members have changed."""

    members: tuple[str, ...]


class PiecePeer(Struct, frozen=True, array_like=True):
    """A host that gives pieces of models at `endpoint` and has the key `key`."""

    name: str
    endpoint: str
    key: str


class PieceHint(Struct, frozen=True, array_like=True):
    """Pieces [first, last) of the model's list are best had from the host with the key `peer`: it is getting them from
    the head now."""

    peer: str
    first: int
    last: int


class SharedModel(Struct, frozen=True, kw_only=True):
    """A model that lies on other hosts. `digest` is the SHA-256 of its piece list; `peers` are asked for what is
    missing, the head last."""

    name: str
    digest: str
    peers: tuple[PiecePeer, ...]
    hints: tuple[PieceHint, ...] = ()


# Control: head ↔ worker.


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
    """Listen, answer `Listening`, load layers [first, last) of the model in folder `model_path` with its matrices in
    the form `weights`, wait for `Connect`. On another host than the head's, `shared` says where the model is to be had.

    `listen` says from where the stage before connects: from this host ("local") or another one ("network"), and then
    only whoever has the key `upstream`."""

    fence: Fence
    stage: int
    first: int
    last: int
    num_layers: int
    model_path: str
    compute_dtype: DType
    wire_dtype: DType
    next_dtype: DType
    context_tokens: int
    kv_capacity_tokens: int
    max_step_tokens: int
    listen: Literal["local", "network"]
    weights: WeightsForm = "stored"
    kv: KVForm = "full"
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
    code: str
    message: str
    hint: str = ""


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


# Measuring: head ↔ worker, before a ring is loaded. An answer has its question's token.


class Profile(Struct, frozen=True, tag="profile", kw_only=True):
    """Measure layers of a model (see `shard.profile`); answered by `Doing` now and then, and `Profiled`."""

    token: int = 0
    model_path: str
    dtype: DType
    budget_s: float
    memory_bytes: int
    weights: WeightsForm = "stored"
    shared: SharedModel | None = None


class Doing(Struct, frozen=True, tag="doing"):
    """What is being measured now."""

    token: int
    what: str


class Profiled(Struct, frozen=True, tag="profiled"):
    """A ProfileReport in JSON. The layers stay loaded until `EndProfile`, or until something else is to be done."""

    token: int
    report: bytes


class Steady(Struct, frozen=True, tag="steady", kw_only=True):
    """Run the profiled layers over and over for `seconds`, while other devices do so too; answered by `SteadyTime`."""

    token: int = 0
    seconds: float


class SteadyTime(Struct, frozen=True, tag="steady_time"):
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
    code: str
    message: str
    hint: str = ""


class Alive(Struct, frozen=True, tag="alive"):
    """A worker's sign of life, once a second; the head gives up on a worker that is silent for several."""


class Stop(Struct, frozen=True, tag="stop"):
    """Leave: release everything and exit."""

    reason: str = ""


MeasureQuestion = Profile | Steady | LinkListen | LinkProbe
MeasureAnswer = Profiled | SteadyTime | LinkListening | LinkProbed | MeasureFault

ControlMessage = (
    Arrive
    | Welcome
    | Members
    | Reach
    | Reached
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
    | Alive
    | Stop
    | MeasureQuestion
    | MeasureAnswer
    | Doing
    | EndProfile
)
