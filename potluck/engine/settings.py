"""What an engine process is started with."""

from __future__ import annotations

from msgspec import Struct

from planner.stage_times import StageTimes
from transport.messages import DType, Fence


class EngineSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model, the ring's two ends (`first_stage`, `listen`), and `api`, where the HTTP side connects.

    `listener` is the inherited descriptor of the socket that listens at `listen`, if there is one. Where an end is on
    another host, or there is no ipc, `keys` is the file with this host's keys, and `first_stage_key` and `upstream` are
    those of the hosts of the first and the last stage; empty ones are this host's. `stage_times` and
    `hops_s` (all hops of a step together) are what the plan expects; empty and 0 where nothing was measured.
    `has_window`: some layers forget positions, so that going back far is not possible.
    """

    model: str
    model_path: str
    api: str
    listen: str
    listener: int | None
    first_stage: str
    fence: Fence
    num_stages: int
    hidden_size: int
    vocab_size: int
    wire_dtype: DType
    context_tokens: int
    kv_capacity_tokens: int
    max_step_tokens: int
    stage_times: tuple[StageTimes, ...] = ()
    hops_s: float = 0.0
    has_window: bool = False
    prefix_cache: bool = True
    keys: str | None = None
    first_stage_key: str = ""
    upstream: str = ""
