"""Compiles kernels for this machine's processor, once a process, and calls them in torch's own thread pool."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from shard.torch_backend.cpu.dot import (
    InstructionSet,
    has_bfloat_dots,
    has_halves,
    has_wide_vectors,
    instruction_sets,
)

_TEAM_SYMBOLS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

Run = Callable[[int], None]
"""Runs a kernel over the fields at an address, and returns when it is done."""

TeamRun = Callable[[int, int], None]
"""(address of the fields, threads)."""


class Compiled:
    """A module, or its text, as machine code, for as long as this object or one of its functions lives."""

    def __init__(self, module: ir.Module | str) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._team = _team()
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        self._engine = llvm.create_mcjit_compiler(optimized(module, machine), machine)
        self._engine.finalize_object()

    @property
    def has_teams(self) -> bool:
        return self._team is not None

    def address(self, name: str) -> int:
        """Where the function is. Hold this object as long as it may be called."""
        found: int = self._engine.get_function_address(name)
        return found

    def run(self, name: str) -> Run:
        function: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.get_function_address(name))
        function.code = self._engine
        run: Run = function
        return run

    def team_run(self, name: str) -> TeamRun | None:
        """`name` on each thread of a team; None where there are no teams."""
        team, engine = self._team, self._engine
        if team is None:
            return None
        each = engine.get_function_address(name)

        def run(fields: int, threads: int) -> None:
            assert engine is not None  # Held: `each` is in it.
            team(each, fields, threads, 0)

        return run


def host_instruction_sets() -> list[InstructionSet]:
    """What this machine's processor can run, the fastest first."""
    return instruction_sets(*_host())


def host_has_halves() -> bool:
    """Whether this machine's processor converts float16."""
    return has_halves(*_host())


def host_has_bfloat_dots() -> bool:
    """Whether this machine's processor adds up products of bfloat16 pairs."""
    return has_bfloat_dots(_host()[1])


def host_has_wide_vectors() -> bool:
    """Whether this machine's processor has 32 registers of 16 floats."""
    return has_wide_vectors(_host()[1])


def _host() -> tuple[str, dict[str, bool]]:
    """Its architecture and features, as LLVM names them."""
    triple = llvm.get_process_triple()
    features = dict(llvm.get_host_cpu_features())
    if triple.startswith("arm64-apple"):
        features["dotprod"] = True  # Every one has it, and LLVM does not always say so.
    return triple.partition("-")[0], features


def optimized(module: ir.Module | str, machine: Any) -> Any:
    """The module ready for code generation. `Any`: llvmlite is untyped."""
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(3)
    tuning.loop_unrolling = False  # The kernels are unrolled as written; more only costs time to compile.
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


Fields = ctypes.Array[ctypes.c_int64]


def empty_fields(count: int) -> tuple[Fields, int]:
    """`count` fields, all 0, and their address."""
    fields = (ctypes.c_int64 * count)()
    return fields, ctypes.addressof(fields)


@cache
def _team() -> Any:
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
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for pattern in ("libgomp*", "libomp*"):
            for path in sorted(folder.glob(pattern)):
                return ctypes.CDLL(str(path))
    return None
