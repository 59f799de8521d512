"""The kernels of quantized projections, compiled when they are first needed: for each number of bits and precision."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from llvmlite import ir

from shard.torch_backend.cpu.compile import Compiled, Fields, host_instruction_sets
from shard.torch_backend.cpu.dot import InstructionSet
from shard.torch_backend.cpu.matmul import Precision, name_of, write_linear
from shard.torch_backend.cpu.program import Program

MANY_ROWS = 16
"""From here on rows are quantized by all threads; a few are done before a barrier would be over."""


class MatrixKernel:
    def __init__(self, compiled: Compiled, name: str) -> None:
        self._compiled, self._name = compiled, name
        self._alone, self._quantize = compiled.run(name), compiled.run(f"{name}_quantize")
        self._team, self._multiply = compiled.team_run(f"{name}_team"), compiled.team_run(f"{name}_multiply_team")

    def __call__(self, fields: int, rows: int, threads: int) -> None:
        """Run it over the fields at an address, which say `rows` too."""
        if threads == 1 or self._team is None or self._multiply is None:
            self._alone(fields)
        elif rows < MANY_ROWS:
            self._quantize(fields)
            self._multiply(fields, threads)
        else:
            self._team(fields, threads)

    @property
    def address(self) -> int:
        """Of the function for one thread."""
        return self._compiled.address(self._name)

    def into(self, program: Program, fields: tuple[Fields, int], rows: int, threads: int) -> None:
        """Put a call for up to so many rows into a program."""
        program.keep(self._compiled)
        if threads == 1 or not self._compiled.has_teams:
            program.call(self.address, fields)
            return
        if rows >= MANY_ROWS:
            program.call(self._compiled.address(f"{self._name}_team"), fields, threads)
            return
        program.call(self._compiled.address(f"{self._name}_quantize"), fields)
        program.call(self._compiled.address(f"{self._name}_multiply_team"), fields, threads)


class MatrixKernels:
    """Those of one instruction set. Each takes half a second to compile."""

    def __init__(self, target: InstructionSet) -> None:
        self.target = target
        self._kernels: dict[tuple[int, Precision], MatrixKernel] = {}

    @property
    def compiled(self) -> Collection[MatrixKernel]:
        """What has been needed so far."""
        return self._kernels.values()

    def kernel(self, bits: int, precision: Precision) -> MatrixKernel:
        """For weights of `bits` and activations of `precision` bits."""
        found = self._kernels.get((bits, precision))
        if found is None:
            compiled = Compiled(matrix_module(self.target, bits, precision))
            found = self._kernels[bits, precision] = MatrixKernel(compiled, name_of(bits, precision))
        return found


@cache
def matrix_kernels() -> MatrixKernels:
    """Those of this machine."""
    return MatrixKernels(host_instruction_sets()[0])


def matrix_module(target: InstructionSet, bits: int, precision: Precision) -> ir.Module:
    module = ir.Module("projection")
    write_linear(module, bits, precision, target)
    return module
