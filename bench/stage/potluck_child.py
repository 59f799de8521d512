"""Our stage with the whole model, as a system under test."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from potluck.measure.child_process import reply_pipe, serve_commands
from shard.pieces.open import open_checkpoint
from shard.stage import StageInput, StageSpec, TokenOutput
from shard.torch_backend.cpu.linear import CpuAffineLinear
from shard.torch_backend.cpu.matmul_kernel import matrix_kernels
from shard.torch_backend.cpu.program import Program
from shard.worker.load import load_shard
from shard.worker.local_stage import LocalStage
from transport.messages.ring import Entry, Op, Open, Release, Sampling, SequenceId

CONTEXT_TOKENS = 2048
_GREEDY = Sampling(temperature=0.0)


class Potluck:
    def __init__(self, model: Path) -> None:
        checkpoint = open_checkpoint(model)
        num_layers = checkpoint.spec.num_layers
        spec = StageSpec(
            first=0,
            last=num_layers,
            num_layers=num_layers,
            device="cpu",
            compute_dtype="bfloat16",
            wire_dtype="bfloat16",
            next_dtype="bfloat16",
            context_tokens=CONTEXT_TOKENS,
            kv_capacity_tokens=16 * CONTEXT_TOKENS,
        )
        shard = load_shard(checkpoint, spec, backend="torch")
        self.facts = {"weights_bytes": shard.weights_bytes, "path": getattr(shard, "path", "library")}
        self._stage = LocalStage(shard)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Greedy, all prompts together, in one step and then a token of each a step. Seconds to the first tokens, and
        of the others."""
        started = time.perf_counter()
        tokens = [[token] for token in self._prefill(prompts)]
        first = time.perf_counter()
        for done in range(num_tokens - 1):
            for row, token in enumerate(self._decode(prompts, tokens, done)):
                tokens[row].append(token)
        decode_s = time.perf_counter() - first
        self._release(prompts)
        return {"first_s": first - started, "decode_s": decode_s, "tokens": tokens}

    def decode_steps(self, prompt: list[int], num_tokens: int, timed: bool) -> dict[str, Any]:
        """Median seconds of a step, and if `timed` of its linear kernels' calls, and how many these are."""
        tokens = [[token] for token in self._prefill([prompt])]
        steps_s, linear_s = [], []
        with _timed_linears() if timed else _untimed() as spent_s:
            for done in range(num_tokens - 1):
                started = time.perf_counter()
                tokens[0] += self._decode([prompt], tokens, done)
                steps_s.append(time.perf_counter() - started)
                linear_s.append(sum(spent_s))
                calls = len(spent_s)
                spent_s.clear()
        self._release([prompt])
        return {"step_s": statistics.median(steps_s), "linear_s": statistics.median(linear_s), "calls": calls}

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        ops = tuple(Open(SequenceId(row), tuple(prompt), _GREEDY) for row, prompt in enumerate(prompts))
        entries = tuple(Entry(SequenceId(row), 0, tuple(prompt), 1) for row, prompt in enumerate(prompts))
        return self._run(ops, entries)

    def _decode(self, prompts: list[list[int]], tokens: list[list[int]], done: int) -> list[int]:
        entries = tuple(
            Entry(SequenceId(row), len(prompt) + done, (tokens[row][-1],), 1) for row, prompt in enumerate(prompts)
        )
        return self._run((), entries)

    def _release(self, prompts: list[list[int]]) -> None:
        self._stage.forward(
            StageInput(ops=tuple(Release(SequenceId(row)) for row in range(len(prompts))), entries=(), hidden=None)
        )

    def _run(self, ops: tuple[Op, ...], entries: tuple[Entry, ...]) -> list[int]:
        output = self._stage.forward(StageInput(ops=ops, entries=entries, hidden=None))
        assert isinstance(output, TokenOutput)
        return [result.tokens[0].token_id for result in output.results]


@contextmanager
def _timed_linears() -> Iterator[list[float]]:
    """Note the seconds of every call of a linear kernel, also of those that are part of a program: its calls are then
    made one by one from here. On one thread."""
    spent_s: list[float] = []
    call, run = CpuAffineLinear.__call__, Program.run

    def timed(self: CpuAffineLinear, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        started = time.perf_counter()
        y = call(self, x, num_decode)
        spent_s.append(time.perf_counter() - started)
        return y

    def run_timed(self: Program) -> None:
        linear = {kernel.address for kernel in matrix_kernels().compiled}
        for function, fields, _ in self.calls:
            native = _function_at(function)
            started = time.perf_counter()
            native(fields)
            if function in linear:
                spent_s.append(time.perf_counter() - started)

    CpuAffineLinear.__call__, Program.run = timed, run_timed  # type: ignore[method-assign]
    try:
        yield spent_s
    finally:
        CpuAffineLinear.__call__, Program.run = call, run  # type: ignore[method-assign]


@cache
def _function_at(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@contextmanager
def _untimed() -> Iterator[list[float]]:
    yield []


def main() -> int:
    replies = reply_pipe()
    torch.set_num_threads(int(sys.argv[2]))
    potluck = Potluck(Path(sys.argv[1]))
    serve_commands({"generate": potluck.generate, "decode_steps": potluck.decode_steps}, potluck.facts, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
