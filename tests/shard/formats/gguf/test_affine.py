"""GGUF as affine groups: the file's own numbers, exactly, or nearly so where a type has no such form."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from shard.formats.gguf.checkpoint import GgufCheckpoint
from shard.formats.gguf.header import read_header
from shard.formats.gguf.quants import affine_form, affine_rows
from shard.pieces.open import open_checkpoint
from tests.support.shard.tiny_gguf import ingested, write_gguf
from transport.errors import BadCheckpoint, PotluckError

EXACT = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "IQ4_NL": 8, "IQ4_XS": 8}
# The relative rms error that 8 bits in groups of 32 add, to numbers of a normal distribution.
REQUANTIZED = {"Q6_K": 0.006, "Q2_K": 0.006, "Q3_K": 0.006, "IQ3_S": 0.006, "MXFP4": 0.006}


def random_blocks(kind: str, rows: int, columns: int, seed: int = 1) -> np.ndarray:
    """Rows of `kind` with every bit at random but those of float16 scales, which are finite. uint8 [rows, bytes]."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows * columns // block, block_bytes), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,)):
        scales = draw.standard_normal(len(blocks)).astype(np.float16)
        scales[:3] = [6e-8, 65504, 0]  # Subnormal, the largest, zero.
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", EXACT)
def test_every_number_is_the_files_own(kind: str) -> None:
    data = random_blocks(kind, 65, 512)
    expected = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
    form, rows = affine_form(kind, (65, 512)), affine_rows(data, kind)
    assert form is not None and form.exact
    assert (form.bits, form.group) == (EXACT[kind], 32)
    assert rows.q.dtype == np.uint8 and rows.q.max() < 2**form.bits
    assert rows.scales.shape == rows.biases.shape == (65, 16)
    # As bits, but for the sign of zero: a negative scale times zero.
    actual = rows.dequantized() + np.float32(0)
    np.testing.assert_array_equal(actual.view(np.uint32), (expected + np.float32(0)).view(np.uint32))


@pytest.mark.parametrize(("kind", "limit"), REQUANTIZED.items())
def test_types_without_an_affine_form_lose_little(kind: str, limit: float) -> None:
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32) * np.float32(0.02)
    data = _quantized(values, kind)
    dense = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
    form, rows = affine_form(kind, dense.shape), affine_rows(data, kind)
    assert form is not None and not form.exact and (form.bits, form.group) == (8, 32)
    error = float(np.sqrt(np.square(rows.dequantized() - dense).mean() / np.square(dense).mean()))
    print(f"{kind}: relative rms error {error:.5f}")
    assert error < limit


def _quantized(values: np.ndarray, kind: str) -> np.ndarray:
    """The gguf package writes few of these types: blocks of plausible scales and random bits for the others."""
    qtype = GGMLQuantizationType[kind]
    try:
        packed: np.ndarray = gguf.quants.quantize(values, qtype)
        return packed
    except NotImplementedError:
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        draw = np.random.default_rng(1)
        blocks = draw.integers(0, 256, (values.size // block, block_bytes), dtype=np.uint8)
        for at in {"Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}.get(kind, (0,)):
            scales = (1e-3 * (1 + draw.random(len(blocks)))).astype(np.float16)
            blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
        return blocks.reshape(len(values), -1)


def test_floats_and_vectors_stay_dense() -> None:
    for kind in ("F32", "F16", "BF16"):
        assert affine_form(kind, (64, 64)) is None
    assert affine_form("Q8_0", (64,)) is None
    assert affine_form("Q8_0", (4, 64, 64)) is not None


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufCheckpoint, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("llama")
    expected = write_gguf(folder / "m.gguf", kind=GGMLQuantizationType.Q4_1)
    return ingested(folder / "m.gguf", folder / "index"), expected


def test_scales_move_with_the_rows_of_llamas_q_and_k(llama: tuple[GgufCheckpoint, dict[str, np.ndarray]]) -> None:
    checkpoint, expected = llama
    for name, values in expected.items():
        info = checkpoint.tensors[name]
        assert (info.affine is not None) == (values.ndim == 2)
        if info.affine is not None:
            rows = checkpoint.read_affine(name, 0, len(values))
            np.testing.assert_array_equal(rows.dequantized(), values, err_msg=name)


def test_any_range_of_rows_is_that_part_of_the_whole(llama: tuple[GgufCheckpoint, dict[str, np.ndarray]]) -> None:
    checkpoint, expected = llama
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        values = expected[name]
        for first, last in [(0, 1), (0, 16), (3, 5), (15, 17), (7, 41), (16, 32), (63, 64), (5, 5), (64, 64)]:
            rows = checkpoint.read_affine(name, first, last - first)
            np.testing.assert_array_equal(rows.dequantized(), values[first:last])
            out = np.empty((last - first, values.shape[1]), np.float32)
            checkpoint.read_rows(name, first, out, "float32")
            np.testing.assert_array_equal(out, values[first:last])
    norm = np.empty((1, 64), np.float32)
    checkpoint.read_rows("model.norm.weight", 0, norm, "float32")
    np.testing.assert_array_equal(norm[0], expected["model.norm.weight"])


def test_rows_of_many_blocks(
    monkeypatch: pytest.MonkeyPatch, llama: tuple[GgufCheckpoint, dict[str, np.ndarray]]
) -> None:
    checkpoint, expected = llama
    monkeypatch.setattr("shard.formats.gguf.checkpoint._BLOCK_ELEMENTS", 700)
    for name, values in expected.items():
        out = np.empty(values.shape, np.float32)
        checkpoint.read_into(name, out, "float32")
        np.testing.assert_array_equal(out, values, err_msg=name)
        if values.ndim == 2:
            rows = checkpoint.read_affine(name, 9, len(values) - 13)
            np.testing.assert_array_equal(rows.dequantized(), values[9:-4], err_msg=name)


def test_rows_that_are_not_there_are_a_callers_mistake(llama: tuple[GgufCheckpoint, dict[str, np.ndarray]]) -> None:
    checkpoint, _ = llama
    for first, num_rows in [(-1, 2), (60, 5), (0, -1)]:
        with pytest.raises(ValueError, match="no rows"):
            checkpoint.read_affine("model.layers.0.self_attn.q_proj.weight", first, num_rows)
    with pytest.raises(ValueError, match="not quantized"):
        checkpoint.read_affine("model.norm.weight", 0, 1)
    with pytest.raises(BadCheckpoint, match="no tensor"):
        checkpoint.read_affine("x", 0, 1)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=GGMLQuantizationType.Q8_0)
    checkpoint = ingested(tmp_path / "m.gguf", tmp_path / "index")
    name = "model.layers.0.mlp.up_proj.weight"
    at = checkpoint._tensors[name].offset + 34
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.seek(at)
        file.write(np.float16(np.inf).tobytes())
    with pytest.raises(BadCheckpoint, match="infinite") as raised:
        checkpoint.read_affine(name, 0, 96)
    assert name in raised.value.message
    checkpoint.read_affine(name, 8, 88)


def test_smollm2_is_read_as_it_is(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    for name in ("model.layers.7.self_attn.k_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        info = checkpoint.tensors[name]
        assert info.affine is not None and info.affine.bits == 4
        dense = np.empty(info.shape, np.float32)
        checkpoint.read_into(name, dense, "float32")
        np.testing.assert_array_equal(checkpoint.read_affine(name, 0, info.shape[0]).dequantized(), dense)


@dataclass(frozen=True, slots=True)
class Small:
    """A GGUF that may be overwritten, the bytes of it, and how many of these are its header."""

    file: Path
    whole: bytes = field(repr=False)
    header_bytes: int


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    file = tmp_path_factory.mktemp("small") / "m.gguf"
    write_gguf(file, kind=GGMLQuantizationType.Q4_1)
    return Small(file, file.read_bytes(), min(tensor.offset for tensor in read_header(file).tensors))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_header_with_flipped_bytes_is_read_or_refused_by_an_error_of_ours(small: Small, data: st.DataObject) -> None:
    changed = bytearray(small.whole)
    # The strings of the tokenizer are most of a header: what comes before and after them matters here.
    places = st.one_of(
        st.integers(0, 900), st.integers(small.header_bytes - 1800, small.header_bytes - 1), st.integers(0, 8000)
    )
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(places)
        changed[at] = data.draw(st.one_of(st.integers(0, 255), st.integers(0, 40)))
    small.file.write_bytes(changed)
    with contextlib.suppress(PotluckError), np.errstate(all="raise"):
        checkpoint = ingested(small.file, small.file.parent / "index")
        try:
            read_everything(checkpoint)
        finally:
            checkpoint.close()


def read_everything(checkpoint: GgufCheckpoint) -> None:
    assert checkpoint.spec.num_layers > 0
    for name, info in checkpoint.tensors.items():
        out = np.empty(info.shape, np.float32)
        checkpoint.read_into(name, out, "float32")
        if info.affine is not None:
            checkpoint.read_affine(name, 0, out.size // info.shape[-1])
