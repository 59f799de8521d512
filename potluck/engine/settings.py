"""Settings and limits say what an engine process is started with and what it may promise."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from planner.measurements import StageTimes
from transport.links.secure_endpoints import Where
from transport.messages.ring import DType, Fence


class EngineSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine process is started with: the model, `api`, where the HTTP side connects, `run_dir` for its
    sockets, and `keys`, the file with this host's keys, if it has any."""

    model: str
    model_path: str
    api: str
    run_dir: str
    hidden_size: int
    vocab_size: int
    prefix_cache: bool = True
    keys: str | None = None


class RingSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ring as its engine has to know it.

    It listens for the last stage on this host or, at `address`, for another one. `first_stage_key` and `upstream` are
    the keys of the hosts of the first and the last stage; empty ones are this host's. `stage_times` and `hops_s` (all
    hops of a step together) are what the plan expects; empty and 0 where nothing was measured. `has_window`: some
    layers forget positions, so that going back far is not possible.
    """

    fence: Fence
    first_stage: str
    first_stage_key: str = ""
    upstream: str = ""
    listen: Where = "local"
    address: str | None = None
    num_stages: int
    wire_dtype: DType
    context_tokens: int
    kv_capacity_tokens: int
    max_step_tokens: int
    stage_times: tuple[StageTimes, ...] = ()
    hops_s: float = 0.0
    has_window: bool = False


class Attach(Struct, frozen=True, tag="attach"):
    """Head → engine: listen for this ring's last stage. `RingAttached` or `EngineDown` answers."""

    ring: RingSpec


class WarmUp(Struct, frozen=True, tag="warm_up"):
    """Head → engine: all stages have loaded. `EngineReady` or `EngineDown` answers."""

    fence: Fence


class Detach(Struct, frozen=True, tag="detach"):
    """Head → engine: leave that ring; its requests end with this error. `EngineDown` answers, if it was attached."""

    fence: Fence
    code: str
    message: str
    hint: str = ""


EngineCommand = Attach | WarmUp | Detach


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Fixed by the plan and the owner.

    `kv_capacity_tokens` is what all sequences together may hold on each stage, those kept for their prefixes included.
    How many steps are in flight is the scheduler's choice, up to `max_steps_in_flight`; so is the size of a prompt's
    chunks, up to `max_chunk_tokens`, unless `fixed_chunk_tokens` says it. `max_queued_requests` counts those that wait
    for KV memory. `stage_times` and `hops_s` (all hops of a step) are what the plan expects. `has_window`: some layers
    forget positions.
    """

    context_tokens: int
    kv_capacity_tokens: int
    vocab_size: int
    num_stages: int = 1
    stage_times: tuple[StageTimes, ...] = ()
    hops_s: float = 0.0
    has_window: bool = False
    prefix_cache: bool = True
    max_steps_in_flight: int = 64
    max_chunk_tokens: int = 512
    fixed_chunk_tokens: int | None = None
    max_active_sequences: int = 128
    max_queued_requests: int = 256
    max_choices: int = 16

    @property
    def sequence_tokens(self) -> int:
        """The most tokens, prompt and answer, that one sequence can have."""
        return min(self.context_tokens, self.kv_capacity_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDeadlines:
    """How long the ring may make no progress: `factor` times the slowest tokens seen of late, within bounds.

    Before anything has been measured it is `first_s`: weights may still come from the disk.
    """

    first_s: float = 120.0
    min_s: float = 10.0
    max_s: float = 600.0
    factor: float = 6.0
