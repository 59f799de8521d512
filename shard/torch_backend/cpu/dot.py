"""Instruction sets: how 4 products of bytes are added to each 32-bit lane, and how wide vectors are.

x86: VPDPBUSD (AVX512-VNNI, AVX-VNNI), or VPMADDUBSW and VPMADDWD (AVX2). Arm: SDOT. Anything else: plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llvmlite import ir

from shard.torch_backend.cpu.builder import I8, I16, I32, Kernel, Value, filled, vector

Dot = Callable[[Kernel, int, Value, Value, Value], Value]
"""(kernel, lanes, sums i32 [lanes], weights u8 [4 · lanes], activations i8 [4 · lanes]) → sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """`signed`: weights of 8 bits are handed to `dot` less 128, because its bytes are signed. `halves`: the processor
    converts float16; where it does not, LLVM would call a function that is not there."""

    name: str
    lanes: int
    dot: Dot
    signed: bool = False
    halves: bool = True


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
    return [*found, InstructionSet(name="generic", lanes=4, dot=_plain, halves=has_halves(architecture, features))]


def has_halves(architecture: str, features: Mapping[str, bool]) -> bool:
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
