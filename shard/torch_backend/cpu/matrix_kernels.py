"""The kernels of quantized projections, compiled when they are first needed: for each number of bits and precision."""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from shard.torch_backend.cpu.compile import Compiled, TeamRun, host_instruction_sets
from shard.torch_backend.cpu.dot import InstructionSet
from shard.torch_backend.cpu.matmul import Precision, name_of, write_linear


class MatrixKernels:
    """Those of one instruction set. Each takes half a second to compile."""

    def __init__(self, target: InstructionSet) -> None:
        self.target = target
        self._runs: dict[tuple[int, Precision], TeamRun] = {}

    def run(self, bits: int, precision: Precision) -> TeamRun:
        """The kernel for weights of `bits` and activations of `precision` bits."""
        found = self._runs.get((bits, precision))
        if found is None:
            compiled = Compiled(matrix_module(self.target, bits, precision))
            found = self._runs[bits, precision] = compiled.team_run(name_of(bits, precision))
        return found


@cache
def matrix_kernels() -> MatrixKernels:
    """Those of this machine."""
    return MatrixKernels(host_instruction_sets()[0])


def matrix_module(target: InstructionSet, bits: int, precision: Precision) -> ir.Module:
    module = ir.Module("projection")
    write_linear(module, bits, precision, target)
    return module
