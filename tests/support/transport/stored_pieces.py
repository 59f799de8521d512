"""Pieces of made-up bytes in a store, and processes that use it."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from transport.messages.pieces import Piece
from transport.pieces.store import PieceStore


def piece_of(data: bytes) -> Piece:
    return Piece(hashlib.sha256(data).hexdigest(), len(data))


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(num_bytes)


def fill(store: PieceStore, *contents: bytes) -> list[Piece]:
    pieces = [piece_of(data) for data in contents]
    for piece, data in zip(pieces, contents, strict=True):
        store.put(data, piece.digest)
    return pieces


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
