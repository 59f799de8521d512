"""Compiles the kernels for this machine's processor, once a process, and calls them in torch's own thread pool."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from shard.torch_backend.cpu.dot import InstructionSet, instruction_sets
from shard.torch_backend.cpu.matmul import PRECISIONS, name_of, write_linear

_TEAM_SYMBOLS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

Run = Callable[[int, int], None]
"""(address of the fields, threads): runs a kernel and returns when it is done."""


class CompiledKernels:
    """The kernels as machine code, for as long as this object lives."""

    def __init__(self, target: InstructionSet, engine: Any, runs: Mapping[str, Run]) -> None:
        self.target = target
        self._engine = engine  # Holds the code.
        self.runs = runs


@cache
def kernels() -> CompiledKernels:
    """Those of this machine; takes a second when first called."""
    return compiled(host_instruction_sets()[0])


def host_instruction_sets() -> list[InstructionSet]:
    """What this machine's processor can run, the fastest first."""
    architecture = llvm.get_process_triple().partition("-")[0]
    return instruction_sets(architecture, llvm.get_host_cpu_features())


@cache
def compiled(target: InstructionSet) -> CompiledKernels:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    team = _team_symbols()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(optimized(target, machine), machine)
    engine.finalize_object()
    names = [name_of(bits, precision) for bits in (4, 8) for precision in PRECISIONS]
    return CompiledKernels(target, engine, {name: _run(engine, name, team) for name in names})


def optimized(target: InstructionSet, machine: Any) -> Any:
    """The module of all kernels, ready for code generation. `Any`: llvmlite is untyped."""
    module = ir.Module("potluck")
    for bits in (4, 8):
        for precision in PRECISIONS:
            write_linear(module, bits, precision, target)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(3)
    tuning.loop_unrolling = False  # The kernels are unrolled as written; more only costs time to compile.
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def _run(engine: Any, name: str, team: Any) -> Run:
    alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address(name))
    if team is None:
        return lambda fields, threads: alone(fields)
    each = engine.get_function_address(f"{name}_team")

    def run(fields: int, threads: int) -> None:
        if threads == 1:
            alone(fields)
        else:
            team(each, fields, threads, 0)

    return run


def _team_symbols() -> Any:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP library that torch runs on, so that both share
    one pool; None where there is none with that interface (the kernels then run on one thread)."""
    library = _openmp()
    if library is None or not all(hasattr(library, symbol) for symbol in _TEAM_SYMBOLS):
        for symbol in _TEAM_SYMBOLS:  # Named in the code, never called.
            llvm.add_symbol(symbol, ctypes.cast(_NEVER, ctypes.c_void_p).value)
        return None
    for symbol in _TEAM_SYMBOLS:
        llvm.add_symbol(symbol, ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value)
    parallel = library.GOMP_parallel
    parallel.restype = None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return parallel


_NEVER = ctypes.CFUNCTYPE(None)(lambda: None)


def _openmp() -> ctypes.CDLL | None:
    folder = Path(torch.__file__).parent / "lib"
    for pattern in ("libgomp*", "libomp*"):
        for path in sorted(folder.glob(pattern)):
            return ctypes.CDLL(str(path))
    return None
