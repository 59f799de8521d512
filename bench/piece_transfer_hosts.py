"""The hosts of `bench.piece_transfer`, each a process that is told what to do, and the model that they get."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from bench.contestant import ROOT
from bench.piece_transfer_child import LIST_FILE, MODEL_FILE
from transport.pieces.piece import LIST_VERSION, MAX_PIECE_BYTES, ListedFile, PieceList, PlacedPiece

_MODULE = "bench.piece_transfer_child"
_SMALL_BYTES = 4096
_NUM_SMALL = 20

Start = Callable[..., subprocess.Popen[str]]


class Ended(RuntimeError):
    """A child that ended instead of answering."""


class Host:
    """A child process; `peer` is how others reach it: name, endpoint, key."""

    def __init__(self, stack: ExitStack, start: Start, name: str, address: str, model: Path, digest: str) -> None:
        self.name = name
        self._process = start(
            [sys.executable, "-P", "-m", _MODULE, name, address, str(model), digest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        stack.callback(self.kill)
        self.peer: list[str] = self.answer()["peer"]

    @property
    def key(self) -> str:
        return self.peer[2]

    def tell(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Ended(f"{self.name} ended with {self._process.wait()}: its last words are above")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.tell(do, **arguments)
        return self.answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class Model:
    """Random stages in one file, with its list."""

    def __init__(self, folder: Path, stage_bytes: Sequence[int]) -> None:
        self.folder = folder
        self.sizes: list[int] = []
        self.stages: list[list[int]] = []
        placed: list[PlacedPiece] = []
        offset = 0
        with (folder / MODEL_FILE).open("wb") as file:
            for number, num_bytes in enumerate(stage_bytes):
                sizes = _piece_sizes(num_bytes)
                self.stages.append(list(range(len(placed), len(placed) + len(sizes))))
                for size in sizes:
                    data = os.urandom(size)
                    file.write(data)
                    placed.append(PlacedPiece(offset, size, hashlib.sha256(data).hexdigest(), f"stage {number}"))
                    offset += size
                self.sizes += sizes
        listed = ListedFile(name=MODEL_FILE, num_bytes=offset, pieces=tuple(placed))
        content = msgspec.json.encode(
            PieceList(version=LIST_VERSION, model="random", format="safetensors", files=(listed,))
        )
        (folder / LIST_FILE).write_bytes(content)
        self.digest = hashlib.sha256(content).hexdigest()

    def num_bytes(self, numbers: Sequence[int]) -> int:
        return sum(self.sizes[number] for number in numbers)


def _piece_sizes(num_bytes: int) -> list[int]:
    """Small tensors, and large ones in pieces."""
    rest = num_bytes - _NUM_SMALL * _SMALL_BYTES
    large = [MAX_PIECE_BYTES] * (rest // MAX_PIECE_BYTES)
    return [_SMALL_BYTES] * _NUM_SMALL + large + ([rest % MAX_PIECE_BYTES] if rest % MAX_PIECE_BYTES else [])
