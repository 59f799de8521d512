"""AWQ and GPTQ folders, packed here number by number: what is read is s · (q - zero), transposed back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from shard.formats.checkpoint import DenseView
from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from tests.support.shard import tiny
from tests.support.shard.packed_folders import AWQ, GPTQ, INPUTS, MODULE, OUTPUTS, awq, draw, gptq, rounded, write
from tests.support.shard.stage_runner import Runner, load_stage, run_step, tiny_spec
from transport.errors import BadCheckpoint, UnsupportedModel
from transport.messages.ring import Entry, SequenceId

NAME = MODULE + ".weight"


def expected(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [outputs, inputs]."""
    group_of = np.arange(INPUTS) // (INPUTS // len(scales))
    return (scales[group_of].astype(np.float32) * (q - zeros[group_of]).astype(np.float32)).T


def check(checkpoint: SafetensorsCheckpoint, values: np.ndarray) -> None:
    for first, last in [(0, OUTPUTS), (0, 1), (7, 9), (13, 30), (39, 40), (40, 40)]:
        rows = checkpoint.read_affine(NAME, first, last - first)
        np.testing.assert_array_equal(rows.dequantized(), values[first:last])
        assert all(array.flags.c_contiguous for array in (rows.q, rows.scales, rows.biases))
        dense = np.empty((last - first, INPUTS), np.float32)
        checkpoint.read_rows(NAME, first, dense, "float32")
        np.testing.assert_array_equal(dense, values[first:last])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq_is_read_exactly(tmp_path: Path, group: int) -> None:
    numbers = draw(4, group)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, awq(*numbers), AWQ | {"group_size": group}))
    info = checkpoint.tensors[NAME]
    assert (info.shape, info.format) == ((OUTPUTS, INPUTS), "AWQ 4-bit")
    assert info.affine is not None and (info.affine.bits, info.affine.group, info.affine.exact) == (4, group, True)
    check(checkpoint, expected(*numbers))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_is_read_exactly(tmp_path: Path, bits: int, group: int, form: str) -> None:
    numbers = draw(bits, group)
    parts = gptq(*numbers, bits, lacking=1 if form == "gptq" else 0)
    facts = GPTQ | {"bits": bits, "group_size": group, "checkpoint_format": form}
    checkpoint = SafetensorsCheckpoint(write(tmp_path, parts, facts))
    assert checkpoint.tensors[NAME].format == f"GPTQ {bits}-bit"
    check(checkpoint, expected(*numbers))


def test_a_zero_of_sixteen_is_not_wrapped(tmp_path: Path) -> None:
    q, zeros, scales = draw(4, 128)
    zeros = np.full_like(zeros, 16)
    check(SafetensorsCheckpoint(write(tmp_path, gptq(q, zeros, scales, 4), GPTQ)), expected(q, zeros, scales))


@pytest.mark.parametrize("facts", [AWQ, GPTQ])
@pytest.mark.parametrize("group_size", [-1, 256])
def test_larger_groups_are_split_into_equal_ones(tmp_path: Path, facts: dict[str, Any], group_size: int) -> None:
    numbers = draw(4, INPUTS)
    parts = awq(*numbers) if facts is AWQ else gptq(*numbers, 4)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, parts, facts | {"group_size": group_size}))
    form = checkpoint.tensors[NAME].affine
    assert form is not None and form.group == 128
    check(checkpoint, expected(*numbers))


def test_only_logical_tensors_are_seen(tmp_path: Path) -> None:
    numbers = draw(4, 128)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, gptq(*numbers, 4), GPTQ))
    assert set(checkpoint.tensors) == {
        NAME,
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.spec.layer_params == (OUTPUTS * INPUTS,) * 2
    assert checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].affine is None


def test_biases_of_zeros_that_fill_a_layer_without_one_are_hidden(tmp_path: Path) -> None:
    parts = gptq(*draw(4, 128), 4)
    bias = np.zeros(OUTPUTS, np.float16)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, parts | {"bias": bias}, GPTQ))
    assert f"{MODULE}.bias" not in checkpoint.tensors
    bias[3] = 0.5
    checkpoint = SafetensorsCheckpoint(write(tmp_path, parts | {"bias": bias}, GPTQ))
    out = np.empty(OUTPUTS, np.float16)
    checkpoint.read_into(f"{MODULE}.bias", out, "float16")
    np.testing.assert_array_equal(out, bias)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        ("model.layers.0.self_attn.q_proj", {"model_type": "qwen2"}),
        ("model.layers.0.self_attn.o_proj", {"attention_bias": True}),
        ("model.layers.0.mlp.down_proj", {"mlp_bias": True}),
    ],
)
def test_biases_that_the_model_has_are_shown_even_if_they_are_zeros(
    tmp_path: Path, module: str, config: dict[str, Any]
) -> None:
    parts = gptq(*draw(4, 128), 4) | {"bias": np.zeros(OUTPUTS, np.float16)}
    folder = write(tmp_path, parts, GPTQ, module)
    whole = json.loads((folder / "config.json").read_text())
    assert f"{module}.bias" not in SafetensorsCheckpoint(folder).tensors
    (folder / "config.json").write_text(json.dumps(whole | config))
    assert f"{module}.bias" in SafetensorsCheckpoint(folder).tensors


def test_act_order_is_refused_by_name_unless_it_changes_nothing(tmp_path: Path) -> None:
    numbers = draw(4, 128)
    parts = gptq(*numbers, 4)
    check(SafetensorsCheckpoint(write(tmp_path, parts, GPTQ | {"desc_act": True})), expected(*numbers))
    scattered = parts | {"g_idx": np.random.default_rng(1).permutation(parts["g_idx"])}
    with pytest.raises(UnsupportedModel, match="act-order") as raised:
        SafetensorsCheckpoint(write(tmp_path, scattered, GPTQ | {"desc_act": True}))
    assert "desc_act" in raised.value.hint
    lying = SafetensorsCheckpoint(write(tmp_path, scattered, GPTQ))
    with pytest.raises(UnsupportedModel, match="act-order"):
        lying.read_affine(NAME, 0, 1)


def test_a_tensor_is_read_once_for_all_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = SafetensorsCheckpoint(write(tmp_path, awq(*draw(4, 128)), AWQ))
    reads: list[str] = []
    original = checkpoint._files.read_bytes

    def read_bytes(tensor: Any, out: np.ndarray, first_byte: int = 0) -> None:
        reads.append(tensor.name)
        original(tensor, out, first_byte)

    monkeypatch.setattr(checkpoint._files, "read_bytes", read_bytes)
    for row in range(OUTPUTS):
        checkpoint.read_affine(NAME, row, 1)
    assert reads.count(f"{MODULE}.qweight") == 1


def test_threads_that_read_two_tensors_in_turn_get_their_own(tmp_path: Path) -> None:
    one, other = draw(4, 128, seed=1), draw(4, 128, seed=2)
    second = "model.layers.1.mlp.down_proj"
    parts = awq(*one) | {f"../{leaf}": array for leaf, array in awq(*other).items()}
    folder = write(tmp_path, {}, AWQ)
    arrays = {"model.norm.weight": np.ones(INPUTS, np.float16)}
    for leaf, array in parts.items():
        module = second if leaf.startswith("../") else MODULE
        arrays[f"{module}.{leaf.removeprefix('../')}"] = array
    save_file(arrays, folder / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(folder)
    wrong: list[str] = []

    def read(name: str, values: np.ndarray) -> None:
        for row in range(0, OUTPUTS, 2):
            if not np.array_equal(checkpoint.read_affine(name, row, 2).dequantized(), values[row : row + 2]):
                wrong.append(name)

    jobs = [(NAME, expected(*one)), (f"{second}.weight", expected(*other))] * 2
    threads = [threading.Thread(target=read, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (AWQ | {"version": "gemv"}, "gemv"),
        (AWQ | {"bits": 3}, "3 bits"),
        (AWQ | {"group_size": 16}, "groups of 16"),
        (AWQ | {"group_size": None}, "groups of None"),
        (AWQ | {"group_size": "128"}, "groups of '128'"),
        (GPTQ | {"bits": 3}, "3 bits"),
        (GPTQ | {"bits": 4.0}, "4.0 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (GPTQ | {"dynamic": {"-:.*mlp.*": {}}}, "dynamic"),
        (GPTQ | {"group_size": 0}, "groups of 0"),
    ],
)
def test_variants_that_cant_be_read_are_refused_by_name(tmp_path: Path, facts: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words) as raised:
        SafetensorsCheckpoint(write(tmp_path, awq(*draw(4, 128)), facts))
    assert raised.value.hint


def changed(leaf: str, array: np.ndarray | None) -> Any:
    def change(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        kept = {key: value for key, value in parts.items() if key != leaf}
        return kept if array is None else kept | {leaf: array}

    return change


@pytest.mark.parametrize(
    ("facts", "change", "words"),
    [
        (GPTQ, changed("scales", None), f"no {MODULE}.scales"),
        (GPTQ, changed("qzeros", None), f"no {MODULE}.qzeros"),
        (GPTQ, changed("qweight", None), "no packed weights"),
        (GPTQ, changed("scales", np.ones((2, OUTPUTS - 1), np.float16)), "needs"),
        (GPTQ, changed("scales", np.ones((2, OUTPUTS), np.int32)), "stored as I32"),
        (GPTQ, changed("qzeros", np.ones((2, OUTPUTS // 8 - 1), np.int32)), "needs"),
        (GPTQ, changed("qzeros", np.ones((2, OUTPUTS // 8), np.float32)), "stored as F32"),
        (GPTQ, changed("qweight", np.ones((INPUTS // 8, OUTPUTS), np.float32)), "int32 words"),
        (GPTQ, changed("qweight", np.ones((INPUTS, 1, OUTPUTS), np.int32)), "int32 words"),
        (GPTQ, changed("qweight", np.ones((0, OUTPUTS), np.int32)), "int32 words"),
        (GPTQ, changed("qweight", np.ones((33, OUTPUTS), np.int32)), "groups of 128"),
        (GPTQ, changed("g_idx", np.ones(INPUTS - 1, np.int32)), "inputs"),
        (GPTQ, changed("weight", np.ones((OUTPUTS, INPUTS), np.float16)), "packed and dense"),
        (GPTQ | {"desc_act": True}, changed("g_idx", None), f"no {MODULE}.g_idx"),
        (GPTQ | {"group_size": 64}, changed("none", None), "needs"),
        (GPTQ | {"group_size": 96}, changed("none", None), "groups of 96"),
        (GPTQ | {"bits": 8}, changed("none", None), "needs"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_once(
    tmp_path: Path, facts: dict[str, Any], change: Any, words: str
) -> None:
    with pytest.raises(BadCheckpoint, match=words) as raised:
        SafetensorsCheckpoint(write(tmp_path, change(gptq(*draw(4, 128), 4)), facts))
    assert MODULE in raised.value.message and raised.value.hint


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_scales_that_are_no_numbers_are_refused_when_read(tmp_path: Path, value: float) -> None:
    q, zeros, scales = draw(4, 128)
    scales[1, 9] = value
    checkpoint = SafetensorsCheckpoint(write(tmp_path, awq(q, zeros, scales), AWQ))
    checkpoint.read_affine(NAME, 0, 9)
    with pytest.raises(BadCheckpoint, match="infinite"):
        checkpoint.read_affine(NAME, 0, 10)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("runner", ["library", "fused", "mlx"])
def test_a_whole_model_runs_as_its_dequantized_numbers_do(tmp_path: Path, method: str, runner: Runner) -> None:
    model = tiny.tiny_model("llama", 0)
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if "_proj.weight" not in name:
            arrays[name] = values
            continue
        q, zeros, scales = rounded(np.ascontiguousarray(values.T))
        group_of = np.arange(len(q)) // 32
        parameter.data.copy_(torch.from_numpy((scales[group_of].astype(np.float32) * (q - zeros[group_of])).T))
        parts = awq(q, zeros, scales) if method == "awq" else gptq(q, zeros, scales, 4)
        arrays |= {name.replace("weight", leaf): array for leaf, array in parts.items()}
    facts = (AWQ if method == "awq" else GPTQ) | {"group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": facts}))
    save_file(arrays, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    # Torch's kernels for packed weights round more than this test allows: there the numbers are read dense.
    held = checkpoint if runner == "mlx" else DenseView(checkpoint)
    ids = list(range(3, 20))
    stages = [load_stage(held, tiny_spec(*cut), runner) for cut in ((0, 2), (2, 4))]  # type: ignore[arg-type]
    logits = run_step(stages, [Entry(SequenceId(1), 0, tuple(ids), len(ids))])
    reference = tiny.reference_logits(model, ids)
    np.testing.assert_allclose(logits, reference, atol=1e-4 * float(np.abs(reference).max()))
