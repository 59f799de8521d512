"""Quantized projections on the CPU compute what the dequantized matrix does, whoever is in the batch."""

from __future__ import annotations

import re
from dataclasses import replace

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch

from shard.formats.affine import AffineForm, AffineRows
from shard.torch_backend.cpu.compile import InstructionSet, host_instruction_sets, instruction_sets, optimize
from shard.torch_backend.cpu.linear import CpuAffineLinear, load_affine_linear
from shard.torch_backend.cpu.matmul_kernel import MatrixKernels, matrix_module
from tests.support.shard.affine_matrices import AffineTensors, random_rows
from transport.errors import BadCheckpoint

FULL_TOLERANCE = 1e-4
"""Relative rms error with 16 bits of activations (measured: 2e-5)."""
BYTE_TOLERANCE = 1.2e-2
"""With 8 bits: measured 5.4e-3 on normal activations."""


def linear(*rows: AffineRows, bits: int = 4, group: int = 32, prefill: int = 16) -> CpuAffineLinear:
    names = [f"w{i}" for i in range(len(rows))]
    form = AffineForm(bits=bits, group=group)
    checkpoint = AffineTensors(forms=dict.fromkeys(names, form), numbers=dict(zip(names, rows, strict=True)))
    return load_affine_linear(checkpoint, names, prefill=prefill)  # type: ignore[arg-type]


def inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32))


def error(got: torch.Tensor, x: torch.Tensor, weights: np.ndarray) -> float:
    wanted = x.numpy().astype(np.float64) @ weights.astype(np.float64).T
    return float(np.sqrt(((got.numpy() - wanted) ** 2).mean() / (wanted**2).mean()))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_it_is_the_dequantized_matrix(bits: int, group: int, symmetric: bool) -> None:
    rows = random_rows(80, 256, bits=bits, group=group, seed=bits + group, symmetric=symmetric)
    made = linear(rows, bits=bits, group=group)
    for count in range(1, 20):
        x = inputs(count, 256, count)
        assert error(made(x, count), x, rows.dequantized()) < FULL_TOLERANCE
        assert error(made(x, 0), x, rows.dequantized()) < FULL_TOLERANCE


@pytest.mark.parametrize("target", host_instruction_sets(), ids=lambda target: target.name)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_instruction_set_does_the_same(
    bits: int, target: InstructionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = MatrixKernels(target)
    monkeypatch.setattr("shard.torch_backend.cpu.linear.matrix_kernels", lambda: found)
    rows = random_rows(50, 256, bits=bits, group=64, seed=bits)
    made = linear(rows, bits=bits, group=64, prefill=8)
    x = inputs(13, 256)
    assert error(made(x, 13), x, rows.dequantized()) < FULL_TOLERANCE
    assert error(made(x, 0), x, rows.dequantized()) < BYTE_TOLERANCE
    assert np.array_equal(made.rows(torch.arange(50)).numpy(), rows.dequantized())


def test_arm_gets_its_own_instruction() -> None:
    """Compiled for it; run on none of the machines that these tests run on."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = instruction_sets("arm64", {"dotprod": True})[0]
    machine = llvm.Target.from_triple("arm64-apple-macosx").create_target_machine(cpu="apple-m1", features="+dotprod")
    for bits in (4, 8):
        assert "sdot" in machine.emit_assembly(optimize(matrix_module(found, bits, 8), machine))


def test_an_old_processor_calls_nothing_that_is_not_there() -> None:
    """One without F16C: LLVM would convert float16 by a function of its compiler's library, at address 0 here."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    found = instruction_sets("x86_64", {})
    assert [one.name for one in found] == ["generic"]
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu="x86-64", features="")
    code = machine.emit_assembly(optimize(matrix_module(found[0], 4, 16), machine))
    called = set(re.findall(r"movabsq\s+\$([A-Za-z_]\w*)", code))
    assert "GOMP_barrier" in called
    assert called <= {"omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"} | {
        f"linear_4_16_{part}" for part in ("quantize_rows", "multiply_tiles")
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_halves_by_integers_are_the_same(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every finite float16 as a scale, subnormal ones and negative ones too."""
    generic = host_instruction_sets()[-1]
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    scales = halves[np.isfinite(halves)].astype(np.float32).reshape(-1, 64)
    q = np.ones((len(scales), 64 * 32), np.uint8)
    rows = AffineRows(q=q, scales=scales, biases=np.zeros_like(scales))
    monkeypatch.setattr("shard.torch_backend.cpu.linear._SAMPLE_ROWS", len(scales))
    results = []
    for native in (True, False):
        found = MatrixKernels(replace(generic, has_float16=native))
        monkeypatch.setattr("shard.torch_backend.cpu.linear.matrix_kernels", lambda found=found: found)
        results.append(linear(rows, bits=bits)(inputs(1, 64 * 32), 1))
    assert torch.equal(*results)


@pytest.mark.parametrize("bits", [4, 8])
def test_prefill_with_bytes_stays_close(bits: int) -> None:
    rows = random_rows(64, 512, bits=bits, group=32, seed=1)
    x = inputs(33, 512)
    made = linear(rows, bits=bits, prefill=8)
    assert FULL_TOLERANCE < error(made(x, 0), x, rows.dequantized()) < BYTE_TOLERANCE
    assert error(made(x, 33), x, rows.dequantized()) < FULL_TOLERANCE


@pytest.mark.parametrize("prefill", [16, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_others(bits: int, prefill: int) -> None:
    made = linear(random_rows(48, 320, bits=bits, group=32, seed=2), bits=bits, prefill=prefill)
    x = inputs(300, 320)
    together = made(x, 5)
    for row in (0, 4, 5, 6, 150, 299):
        num_decode = 1 if row < 5 else 0
        assert torch.equal(made(x[row : row + 1], num_decode)[0], together[row])


def test_threads_change_nothing() -> None:
    made = linear(random_rows(1024, 512, bits=4, group=32, seed=3))
    x = inputs(9, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = made(x, 4)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(made(x, 4), alone)
    finally:
        torch.set_num_threads(before)


def test_parts_of_other_forms_and_odd_sizes_lie_side_by_side() -> None:
    first = random_rows(50, 128, bits=4, group=32, seed=4)
    second = random_rows(33, 128, bits=8, group=64, seed=5)
    third = random_rows(16, 128, bits=4, group=32, seed=6, symmetric=True)
    forms = {"a": AffineForm(bits=4, group=32), "b": AffineForm(bits=8, group=64), "c": AffineForm(bits=4, group=32)}
    checkpoint = AffineTensors(forms=forms, numbers={"a": first, "b": second, "c": third})
    made = load_affine_linear(checkpoint, ["a", "b", "c"], prefill=16)  # type: ignore[arg-type]
    x = inputs(7, 128)
    weights = np.concatenate([rows.dequantized() for rows in (first, second, third)])
    assert made(x, 3).shape == (7, 99)
    assert error(made(x, 3), x, weights) < FULL_TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-4, 1.0, 1e3])
def test_small_and_large_weights_are_as_exact_as_others(bits: int, size: float) -> None:
    """Scales of 1e-8 are no float16: they are kept times a power of two."""
    rows = random_rows(32, 128, bits=bits, group=32, seed=11)
    sized = AffineRows(q=rows.q, scales=rows.scales * np.float32(size), biases=rows.biases * np.float32(size))
    made = linear(sized, bits=bits)
    x = inputs(3, 128)
    assert error(made(x, 3), x, sized.dequantized()) < 5e-4  # Rounding of scales to 11 bits included.
    got = made.rows(torch.arange(32)).numpy()
    assert np.abs(got - sized.dequantized()).max() < 1e-3 * np.abs(sized.dequantized()).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_the_files_own_numbers(bits: int, symmetric: bool) -> None:
    """Scales in float16 and minima in float16, as GGUF's: nothing is rounded on the way in."""
    rows = random_rows(50, 96, bits=bits, group=32, seed=7, symmetric=symmetric)
    ids = torch.tensor([0, 49, 17, 17, 16])
    got = linear(rows, bits=bits).rows(ids).numpy()
    assert np.array_equal(got, rows.dequantized()[ids.numpy()])


def test_zeros_and_large_numbers() -> None:
    rows = random_rows(16, 64, bits=4, group=32, seed=8)
    made = linear(rows)
    assert not made(torch.zeros(1, 64), 1).any()
    x = inputs(1, 64) * 1e30
    assert error(made(x, 1), x, rows.dequantized()) < FULL_TOLERANCE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_so_in_its_row_only(bad: float) -> None:
    made = linear(random_rows(16, 64, bits=4, group=32, seed=8), prefill=8)
    x = inputs(3, 64)
    x[1, 40] = bad
    for num_decode in (0, 3):
        y = made(x, num_decode)
        assert y[1].isnan().all()
        assert y[0].isfinite().all() and y[2].isfinite().all()


def test_a_scale_that_float16_can_not_hold_is_refused() -> None:
    rows = random_rows(16, 64, bits=4, group=32, seed=9)
    for bad in (1e9, np.inf, np.nan):
        scales = rows.scales.copy()
        scales[3, 1] = bad
        with pytest.raises(BadCheckpoint, match="beyond its other ones"):
            linear(AffineRows(q=rows.q, scales=scales, biases=rows.biases))


def test_progress_counts_the_files_bytes() -> None:
    rows = random_rows(4096, 512, bits=4, group=32, seed=10)
    seen: list[int] = []
    checkpoint = AffineTensors(forms={"w": AffineForm(bits=4, group=32)}, numbers={"w": rows})
    load_affine_linear(checkpoint, ["w"], prefill=16, read=seen.append)  # type: ignore[arg-type]
    assert len(seen) > 1
    assert sum(seen) == rows.q.size
