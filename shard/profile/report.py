"""What a profile says of one model on one device, as it crosses processes (JSON)."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from transport.errors import BadMessage


class GridReport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """seconds[i][j] at rows[i] (sequences, tokens or logits) and contexts[j] (tokens of KV before); both ascend."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def is_sound(self) -> bool:
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
    head: GridReport
    step_s: float
    steady_s: float
    others_share: float = 0.0

    def is_sound(self) -> bool:
        """Whether it can be planned with."""
        grids = [self.embed, self.head, *(grid for layer in self.layers for grid in (layer.decode, layer.prefill))]
        return (
            bool(self.kinds)
            and all(0 <= kind < len(self.layers) for kind in self.kinds)
            and all(grid.is_sound() for grid in grids)
            and 0 <= self.step_s < float("inf")
            and 0 < self.steady_s < float("inf")
            and 0 <= self.others_share <= 1
        )


def decode_report(data: bytes) -> ProfileReport:
    """Raises BadMessage for anything that can't be planned with."""
    try:
        report = msgspec.json.decode(data, type=ProfileReport)
    except msgspec.MsgspecError as error:
        raise BadMessage(f"a profile that can't be read: {error}") from error
    if not report.is_sound():
        raise BadMessage("a profile with impossible numbers", hint="measure again with --fresh")
    return report
