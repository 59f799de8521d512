"""Which pieces of a model a stage needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from shard.spec import ModelSpec
from transport.pieces.piece import Piece, PieceList

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EMBEDDING = "model.embed_tokens."
_NORM = "model.norm."
_HEAD = "lm_head."
# Computed from the config by every model class; old checkpoints store them all the same.
_COMPUTED = "rotary_emb.inv_freq"


def nameless_pieces(pieces: PieceList) -> dict[int, Piece]:
    """What every host needs to open the model, by number in the list."""
    return _chosen(pieces, lambda tensor: not tensor)


def engine_pieces(pieces: PieceList) -> dict[int, Piece]:
    """What the host of the engine needs besides, by number in the list."""
    return _chosen(pieces, lambda tensor: True, reader="engine")


def stage_pieces(pieces: PieceList, model: ModelSpec, first: int, last: int) -> dict[int, Piece]:
    """What a stage of layers [first, last) reads, by number in the list: its tensors' pieces and the nameless ones."""
    is_first, is_last = first == 0, last == model.num_layers

    def is_needed(tensor: str) -> bool:
        if not tensor:
            return True
        if tensor.endswith(_COMPUTED):
            return False
        match = _LAYER.match(tensor)
        if match is not None:
            return first <= int(match[1]) < last
        if tensor.startswith(_EMBEDDING):
            return is_first or (is_last and model.tied_embeddings)
        if tensor.startswith(_NORM):
            return is_last
        return tensor.startswith(_HEAD) and is_last and not model.tied_embeddings

    return _chosen(pieces, is_needed)


def _chosen(
    pieces: PieceList, is_wanted: Callable[[str], bool], reader: Literal["stage", "engine"] = "stage"
) -> dict[int, Piece]:
    placed = ((file, piece) for file in pieces.files for piece in file.pieces)
    return {
        number: Piece(piece.digest, piece.num_bytes)
        for number, (file, piece) in enumerate(placed)
        if file.reader == reader and is_wanted(piece.tensor)
    }
