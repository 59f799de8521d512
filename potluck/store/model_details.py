"""Model details say whether a model can chat, which backends run it, and which formats its files hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potluck.store.manifest import StoredModel
from shard.formats.checkpoint import Checkpoint, TensorInfo, loaded_bytes, supported_form
from shard.formats.config import model_part, read_config
from shard.formats.families import backends_of, why_not_fused
from shard.pieces.open import open_checkpoint
from transport.errors import BadCheckpoint, PotluckError
from transport.messages.ring import DType

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetails:
    """`backends` are those that run the architecture, whether or not they are installed here. `library_reason`: why
    torch runs the model by the library's classes, None where it takes the fused path."""

    has_tokenizer: bool
    has_chat_template: bool
    backends: tuple[str, ...]
    library_reason: str | None


def details_of(model: StoredModel) -> ModelDetails:
    return ModelDetails(
        has_tokenizer=any((model.path / name).is_file() for name in _TOKENIZER_FILES),
        has_chat_template=_has_chat_template(model.path),
        backends=backends_of(model.spec.architecture),
        library_reason=why_not_fused(config_of(model), stacked_experts=model.spec.stacked_experts),
    )


def config_of(model: StoredModel) -> dict[str, Any]:
    """config.json; where the model's files are gone, what its record says of it."""
    try:
        return read_config(model.path)
    except BadCheckpoint:
        return {"model_type": model.spec.architecture}


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


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
    with closing(checkpoint):
        return rows_of(checkpoint, dtype)


def rows_of(checkpoint: Checkpoint, dtype: DType) -> tuple[FormatRow, ...]:
    on_torch = supported_form("torch", checkpoint.config, "stored", stacked_experts=checkpoint.spec.stacked_experts)
    groups: dict[tuple[str, Kept, int | None], list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        kept: Kept = "dense" if info.affine is None else "exactly" if info.affine.exact else "anew"
        if model_part(info.name, checkpoint.spec) is None:
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
