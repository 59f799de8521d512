"""What a profile is requested with, and what it reports of one model on one device."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec import Struct

from shard.worker.load import Backend
from transport.errors import BadMessage
from transport.messages.ring import DType, WeightsForm

BUDGET_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """`budget_s` is the time for measuring, after loading; `memory_bytes` what weights may take (None: no bound),
    `weights` how they are held. `dummy_weights`: random ones, of a model whose own need not be on this host."""

    backend: Backend
    device: str
    dtype: DType
    budget_s: float = BUDGET_S
    memory_bytes: int | None = None
    weights: WeightsForm = "stored"
    dummy_weights: bool = False


class GridReport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """seconds[i][j] at rows[i] (sequences, tokens or logits) and contexts[j] (tokens of KV before); both ascend."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def is_plausible(self) -> bool:
        """Whether it can be read at any point: ascending axes, a whole grid, no negative time."""
        axes = all(axis and list(axis) == sorted(set(axis)) for axis in (self.rows, self.contexts))
        shaped = len(self.seconds) == len(self.rows) and all(len(row) == len(self.contexts) for row in self.seconds)
        return axes and shaped and all(0 <= value < float("inf") for row in self.seconds for value in row)


class LayerReport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one layer of a kind."""

    decode: GridReport
    prefill: GridReport


class ProfileReport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kinds[i]` is the kind of layer i. `step_s` is what a step costs besides its layers. `steady_s` is a decode step
    of some layers over and over: of two profiles of devices that are alike, the lower one was disturbed less.
    `others_share` is the share of the host's processors that other programs had meanwhile."""

    kinds: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    embed: GridReport
    lm_head: GridReport
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
            and 0 <= self.step_s < float("inf")
            and 0 < self.under_load_s < float("inf")
            and 0 <= self.others_share <= 1
        )


def decode_report(data: bytes) -> ProfileReport:
    """Raises BadMessage for anything that can't be planned with."""
    try:
        report = msgspec.json.decode(data, type=ProfileReport)
    except msgspec.MsgspecError as error:
        raise BadMessage(f"a profile that can't be read: {error}") from error
    if not report.is_plausible():
        raise BadMessage("a profile with impossible numbers", hint="measure again with --fresh")
    return report
