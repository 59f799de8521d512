"""Where a lean stage's weights come from: first a check that all are there, then the files.

A stage is put together twice by the same code (`build.py`), so that a missing tensor is named before a byte is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from shard.checkpoint import Checkpoint
from shard.stage import ShardSpec
from shard.torch_backend.linear import DenseLinear, Linear, Table, load_linear, load_table
from shard.torch_backend.memory import loading_memory
from shard.weights import Part, TensorNames, total_file_bytes

# A parameter as transformers names it, with layers counted from the stage's first, and its shape.
Wanted = tuple[str, tuple[int, ...]]


class Source(Protocol):
    """Raises BadCheckpoint for a tensor that is missing or has another shape, DoesNotFit out of memory."""

    def linear(self, wanted: Sequence[Wanted]) -> Linear:
        """Matrices [rows_i, columns] of one input, their rows one after another."""

    def table(self, wanted: Wanted) -> Table:
        """A matrix that is read by rows too."""

    def experts(self, wanted: Wanted) -> list[Linear]:
        """A parameter [experts, rows, columns] whose experts are tensors of their own: a projection for each."""

    def dense(self, wanted: Sequence[Wanted]) -> torch.Tensor:
        """Vectors or small matrices, their rows one after another, float32 whatever the file has."""


class Check:
    """Finds every tensor, reads none. The stage that it makes is good for nothing."""

    def __init__(self, names: TensorNames) -> None:
        self._names = names
        self.parts: list[Part] = []

    def linear(self, wanted: Sequence[Wanted]) -> Linear:
        self._find(wanted)
        return DenseLinear(torch.empty(0))

    def table(self, wanted: Wanted) -> Table:
        self._find([wanted])
        return DenseLinear(torch.empty(0))

    def experts(self, wanted: Wanted) -> list[Linear]:
        self._find([wanted])
        return [DenseLinear(torch.empty(0))] * wanted[1][0]

    def dense(self, wanted: Sequence[Wanted]) -> torch.Tensor:
        self._find(wanted)
        return torch.empty(0)

    def _find(self, wanted: Sequence[Wanted]) -> None:
        for name, shape in wanted:
            self.parts.extend(self._names.parts(name, shape))


class Files:
    """Reads from the checkpoint, one tensor at a time. `weights_bytes` is what it has put into memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: TensorNames,
        spec: ShardSpec,
        device: torch.device,
        parts: Sequence[Part],
        progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self._spec = spec
        self._device = device
        self._progress = progress
        self._total_bytes = total_file_bytes(checkpoint.tensors, parts)
        self._read_bytes = 0
        self.weights_bytes = 0
        progress(0, self._total_bytes)

    def linear(self, wanted: Sequence[Wanted]) -> Linear:
        return self._load([part.name for part in self._parts(wanted)])

    def table(self, wanted: Wanted) -> Table:
        (part,) = self._parts([wanted])
        with loading_memory(part.name, self._spec.device):
            made = load_table(self._checkpoint, part.name, self._spec.compute_dtype, self._device, self._read)
        self.weights_bytes += made.num_bytes
        return made

    def experts(self, wanted: Wanted) -> list[Linear]:
        of_expert: dict[int | slice, list[str]] = {}
        for part in self._parts([wanted]):
            of_expert.setdefault(part.index[0], []).append(part.name)
        return [self._load(names) for names in of_expert.values()]

    def dense(self, wanted: Sequence[Wanted]) -> torch.Tensor:
        parts = self._parts(wanted)
        pieces = []
        for part in parts:
            piece = np.empty(part.shape, dtype=np.float32)
            self._checkpoint.read_into(part.name, piece, "float32")
            pieces.append(torch.from_numpy(piece))
        with loading_memory(wanted[0][0], self._spec.device):
            made = torch.cat(pieces).to(self._device)
        self.weights_bytes += made.nbytes
        self._read(total_file_bytes(self._checkpoint.tensors, parts))
        return made

    def _load(self, names: Sequence[str]) -> Linear:
        with loading_memory(names[0], self._spec.device):
            made = load_linear(self._checkpoint, names, self._spec.compute_dtype, self._device, self._read)
        self.weights_bytes += made.num_bytes
        return made

    def _parts(self, wanted: Sequence[Wanted]) -> list[Part]:
        return [part for name, shape in wanted for part in self._names.parts(name, shape)]

    def _read(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        self._progress(self._read_bytes, self._total_bytes)
