"""Kernels are compiled for this processor's instruction sets, and called in torch's own thread pool."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from shard.torch_backend.cpu.ir_builder import I8, I16, I32, Kernel, Value, filled, vector

DotInstruction = Callable[[Kernel, int, Value, Value, Value], Value]
"""(kernel, lanes, sums i32 [lanes], weights u8 [4 · lanes], activations i8 [4 · lanes]) → sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """`signed`: weights of 8 bits are handed to `dot` less 128, because its bytes are signed. `halves`: the processor
    converts float16; where it does not, LLVM would call a function that is not there."""

    name: str
    lanes: int
    dot: DotInstruction
    signed: bool = False
    has_float16: bool = True


def instruction_sets(architecture: str, features: Mapping[str, bool]) -> list[InstructionSet]:
    """Those of a processor, the fastest first: `architecture` as LLVM's triple has it ("x86_64"), `features` as LLVM
    names them."""
    found = []
    if architecture in ("x86_64", "amd64"):
        if features.get("avx512vnni") and features.get("avx512f") and features.get("avx512bw"):
            found.append(InstructionSet(name="AVX512-VNNI", lanes=16, dot=_vnni))
        if features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl")):
            found.append(InstructionSet(name="AVX-VNNI", lanes=8, dot=_vnni))
        if features.get("avx2"):
            found.append(InstructionSet(name="AVX2", lanes=8, dot=_avx2))
    if architecture in ("aarch64", "arm64") and features.get("dotprod"):
        found.append(InstructionSet(name="SDOT", lanes=4, dot=_sdot, signed=True))
    return [
        *found,
        InstructionSet(name="generic", lanes=4, dot=_plain, has_float16=has_float16(architecture, features)),
    ]


def has_float16(architecture: str, features: Mapping[str, bool]) -> bool:
    """Whether the processor converts float16 (F16C; every 64-bit Arm)."""
    return architecture in ("aarch64", "arm64") or bool(features.get("f16c"))


def has_wide_vectors(features: Mapping[str, bool]) -> bool:
    """Whether there are 32 registers of 16 floats (AVX512)."""
    return bool(features.get("avx512f"))


def has_bfloat_dots(features: Mapping[str, bool]) -> bool:
    """Whether the processor adds up products of bfloat16 pairs (AVX512-BF16)."""
    return all(features.get(name) for name in ("avx512bf16", "avx512f", "avx512bw"))


def _vnni(kernel: Kernel, lanes: int, sums: Value, weights: Value, activations: Value) -> Value:
    return kernel.call(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", vector(I32, lanes), [sums, weights, activations])


def _avx2(kernel: Kernel, lanes: int, sums: Value, weights: Value, activations: Value) -> Value:
    """Two products are added in 16 bits: at most 2 · 15 · 128 for four bits of weight, so a byte's halves go apart."""
    builder = kernel.builder
    ones = filled(I16, 2 * lanes, 1)

    def half(nibbles: Value) -> Value:
        pairs = kernel.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 2 * lanes), [nibbles, activations])
        return kernel.call("llvm.x86.avx2.pmadd.wd", vector(I32, lanes), [pairs, ones])

    low = half(builder.and_(weights, filled(I8, 4 * lanes, 15)))
    high = half(builder.lshr(weights, filled(I8, 4 * lanes, 4)))
    return builder.add(sums, builder.add(low, builder.shl(high, filled(I32, lanes, 4))))


def _sdot(kernel: Kernel, lanes: int, sums: Value, weights: Value, activations: Value) -> Value:
    name = f"llvm.aarch64.neon.sdot.v{lanes}i32.v{4 * lanes}i8"
    return kernel.call(name, vector(I32, lanes), [sums, weights, activations])


def _plain(kernel: Kernel, lanes: int, sums: Value, weights: Value, activations: Value) -> Value:
    builder = kernel.builder
    wide = vector(I32, 4 * lanes)
    products = builder.mul(builder.zext(weights, wide), builder.sext(activations, wide))
    for part in range(4):
        picked = builder.shuffle_vector(products, products, _every_fourth(lanes, part))
        sums = builder.add(sums, picked)
    return sums


def _every_fourth(lanes: int, part: int) -> Value:
    return ir.Constant(vector(I32, lanes), [4 * lane + part for lane in range(lanes)])


_TEAM_SYMBOLS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

KernelCall = Callable[[int], None]
"""Runs a kernel over the fields at an address, and returns when it is done."""

TeamCall = Callable[[int, int], None]
"""(address of the fields, threads)."""


class CompiledModule:
    """A module, or its text, as machine code, for as long as this object or one of its functions lives."""

    def __init__(self, module: ir.Module | str) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._team = _team()
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        self._engine = llvm.create_mcjit_compiler(optimize(module, machine), machine)
        self._engine.finalize_object()

    @property
    def has_teams(self) -> bool:
        return self._team is not None

    def address(self, name: str) -> int:
        """Where the function is. Hold this object as long as it may be called."""
        found: int = self._engine.get_function_address(name)
        return found

    def run(self, name: str) -> KernelCall:
        function: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.get_function_address(name))
        function.code = self._engine
        run: KernelCall = function
        return run

    def team_run(self, name: str) -> TeamCall | None:
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


def host_has_float16() -> bool:
    """Whether this machine's processor converts float16."""
    return has_float16(*_host())


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


def optimize(module: ir.Module | str, machine: Any) -> Any:
    """The module ready for code generation. `Any`: llvmlite is untyped."""
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(3)
    tuning.loop_unrolling = False  # The kernels are unrolled as written; more only costs time to compile.
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


KernelFields = ctypes.Array[ctypes.c_int64]


def new_fields(count: int) -> tuple[KernelFields, int]:
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
