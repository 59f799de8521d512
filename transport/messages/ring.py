"""Messages of the data edges (the ring), as frozen tagged structs, and the parts that they have in common with others.

`Hello`, `Tokens` (engine → stage 0), `Hidden` (stage → stage), `Sampled` and `Failed` (→ engine). A message that
carries a tensor is followed by one raw buffer; its size must equal what the header announces.
Beside it: `control` (head ↔ worker), `measure` (the same, before a ring is loaded), `pool` (head ↔ a host's node),
`pieces` (host ↔ host), `requests` (HTTP ↔ engine).
"""

from __future__ import annotations

from typing import Literal, NewType

from msgspec import Struct

PROTOCOL_VERSION = 7

SequenceId = NewType("SequenceId", int)
DType = Literal["float32", "float16", "bfloat16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

WeightsForm = Literal["stored", "dense", "4-bit", "8-bit"]
"""How a stage holds its matrices: as the file has them, quantized or not; all in the compute dtype; or what is not
quantized in the file quantized to so many bits."""

KVForm = Literal["full", "8-bit"]
"""How a stage holds KV: in its compute dtype, or in 8 bits with a scale for each head of each position."""


class StageSpec(Struct, frozen=True, kw_only=True):
    """Layers [first, last) of a model's `num_layers`, on a worker's `device` ("cpu", "cuda:0"), and their precision.

    `kv_capacity_tokens` bounds the tokens of KV that all sequences together may hold; `context_tokens` those of one.
    Hidden states come in as `wire_dtype` and go out as `next_dtype`. `weights` and `kv` are the forms in which
    matrices and KV are held; a backend that can't hold KV in 8 bits refuses it when it loads (UnsupportedModel).
    """

    first: int
    last: int
    num_layers: int
    device: str
    compute_dtype: DType
    wire_dtype: DType
    next_dtype: DType
    context_tokens: int
    kv_capacity_tokens: int
    weights: WeightsForm = "stored"
    kv: KVForm = "full"

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.last == self.num_layers


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


class EntryResult(Struct, frozen=True, array_like=True):
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
    results: tuple[EntryResult, ...]
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
