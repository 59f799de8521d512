"""The kernels of quantized projections, compiled: for each number of bits and precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from shard.torch_backend.cpu.compile import Compiled, TeamRun, host_instruction_sets
from shard.torch_backend.cpu.dot import InstructionSet
from shard.torch_backend.cpu.matmul import PRECISIONS, Precision, name_of, write_linear

BITS = (4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixKernels:
    """`runs` by bits of a weight and of an activation."""

    target: InstructionSet
    runs: Mapping[tuple[int, Precision], TeamRun]


@cache
def matrix_kernels() -> MatrixKernels:
    """Those of this machine; takes a second when first called."""
    return compiled_for(host_instruction_sets()[0])


@cache
def compiled_for(target: InstructionSet) -> MatrixKernels:
    compiled = Compiled(matrix_module(target))
    runs = {(bits, precision): compiled.team_run(name_of(bits, precision)) for bits in BITS for precision in PRECISIONS}
    return MatrixKernels(target=target, runs=runs)


def matrix_module(target: InstructionSet) -> ir.Module:
    module = ir.Module("projections")
    for bits in BITS:
        for precision in PRECISIONS:
            write_linear(module, bits, precision, target)
    return module
