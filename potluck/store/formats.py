"""What a model's files hold, format by format, and what becomes of it on a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from potluck.store.manifest import StoredModel
from shard.checkpoint import Checkpoint, TensorInfo
from shard.model_facts import part_of
from shard.open import open_checkpoint
from shard.stored_bytes import loaded_bytes, weights_on
from transport.errors import PotluckError
from transport.messages import DType

Kept = Literal["exactly", "anew", "dense", "not loaded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRow:
    """The tensors of one format that are kept alike: "exactly" the file's own numbers, quantized "anew" (with a little
    error) because no backend runs the format, "dense", or "not loaded" because no stage needs them. `bits` are those of
    a weight as kept, None for dense ones. A tied head is counted once."""

    format: str
    kept: Kept
    bits: int | None
    num_tensors: int
    file_bytes: int
    torch_bytes: int
    mlx_bytes: int


def format_rows(model: StoredModel, dtype: DType) -> tuple[FormatRow, ...] | None:
    """The largest first, `dtype` is what stages compute in; None where the files can't be read."""
    try:
        checkpoint = open_checkpoint(model.path)
    except PotluckError:
        return None
    try:
        return rows_of(checkpoint, dtype)
    finally:
        checkpoint.close()


def rows_of(checkpoint: Checkpoint, dtype: DType) -> tuple[FormatRow, ...]:
    on_torch = weights_on("torch", checkpoint.config, "stored", stacked_experts=checkpoint.spec.stacked_experts)
    groups: dict[tuple[str, Kept, int | None], list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        kept: Kept = "dense" if info.affine is None else "exactly" if info.affine.exact else "anew"
        if part_of(info.name, checkpoint.spec) is None:
            kept = "not loaded"
        bits = None if info.affine is None or kept == "not loaded" else info.affine.bits
        groups.setdefault((info.format, kept, bits), []).append(info)

    def row(format: str, kept: Kept, bits: int | None, infos: Sequence[TensorInfo]) -> FormatRow:
        loaded: Sequence[TensorInfo] = [] if kept == "not loaded" else infos
        return FormatRow(
            format=format,
            kept=kept,
            bits=bits,
            num_tensors=len(infos),
            file_bytes=sum(info.file_bytes for info in infos),
            torch_bytes=sum(loaded_bytes(info, "torch", dtype, on_torch) for info in loaded),
            mlx_bytes=sum(loaded_bytes(info, "mlx", dtype) for info in loaded),
        )

    rows = (row(*key, infos) for key, infos in groups.items())
    return tuple(sorted(rows, key=lambda one: (-one.file_bytes, one.format)))
