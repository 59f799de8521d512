"""What is planned for weights is what stages hold: by hand for made-up tensors, and against stages that were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard.formats.affine import AFFINE_BITS, AFFINE_GROUPS, AffineForm
from shard.formats.checkpoint import TensorInfo, loaded_bytes, loaded_form, supported_form, weight_block
from shard.formats.config import spec_from
from shard.formats.spec import QUANTIZE_ON_LOAD_BITS, Backend, ModelSpec, WeightBlock, merge_blocks
from shard.stage import StageSpec
from shard.worker.load import in_weights_form, load_shard
from tests.support.shard.tiny import NUM_LAYERS, MemoryCheckpoint, memory_checkpoint, quantized_checkpoint, tiny_model
from transport.messages.ring import DTYPE_BYTES, DType, WeightsForm

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def tensor(name: str, *shape: int, affine: AffineForm | None = None) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, format="made up", file_bytes=1, affine=affine)


@pytest.mark.parametrize(
    ("form", "torch_bytes", "mlx_bytes"),
    [
        # 128 × 256 weights; torch: 4 or 8 bits and 4 bytes a group, MLX: the bits and twice the compute dtype a group.
        (AffineForm(bits=4, group=32), 16384 + 1024 * 4, 16384 + 1024 * 4),
        (AffineForm(bits=4, group=128), 16384 + 256 * 4, 16384 + 256 * 4),
        (AffineForm(bits=3, group=64), 16384 + 512 * 4, 12288 + 512 * 4),
        (AffineForm(bits=5, group=32), 32768 + 1024 * 4, 20480 + 1024 * 4),
        (AffineForm(bits=6, group=32), 32768 + 1024 * 4, 24576 + 1024 * 4),
        (AffineForm(bits=8, group=32, exact=False), 32768 + 1024 * 4, 32768 + 1024 * 4),
        (None, 65536, 65536),
    ],
)
def test_bytes_by_hand(form: AffineForm | None, torch_bytes: int, mlx_bytes: int) -> None:
    info = tensor(Q_PROJ, 128, 256, affine=form)
    assert loaded_bytes(info, "torch", "bfloat16") == torch_bytes
    assert loaded_bytes(info, "mlx", "bfloat16") == mlx_bytes
    assert loaded_bytes(info, "torch", "bfloat16", "dense") == 65536
    assert loaded_bytes(info, "mlx", "float32", "dense") == 131072
    if form is not None:
        assert loaded_bytes(info, "torch", "float32") == torch_bytes
        assert loaded_bytes(info, "mlx", "float32") == mlx_bytes + 128 * 256 // form.group * 4


@pytest.mark.parametrize(
    ("info", "group"),
    [
        (tensor(Q_PROJ, 64, 128), 64),
        (tensor(Q_PROJ, 64, 96), 32),
        (tensor("model.embed_tokens.weight", 100, 64), 64),
        (tensor(Q_PROJ, 64, 40), None),
        (tensor("model.norm.weight", 64), None),
        (tensor("model.layers.0.self_attn.q_proj.bias", 64), None),
        (tensor("model.layers.0.mlp.gate.weight", 8, 64), None),
        (tensor("model.layers.0.mlp.experts.gate_up_proj", 8, 64, 64), None),
    ],
)
def test_only_matrices_of_whole_groups_are_quantized_on_load(info: TensorInfo, group: int | None) -> None:
    assert loaded_form(info, "stored") is None
    for weights, bits in QUANTIZE_ON_LOAD_BITS.items():
        form = loaded_form(info, weights)
        assert form == (None if group is None else AffineForm(bits=bits, group=group, exact=False))


def test_what_is_quantized_in_the_file_stays_as_it_is() -> None:
    form = AffineForm(bits=5, group=32)
    for weights in FORMS[1:]:
        assert loaded_form(tensor(Q_PROJ, 64, 64, affine=form), weights) == form
    assert loaded_form(tensor(Q_PROJ, 64, 64, affine=form), "dense") is None


blocks = st.builds(
    WeightBlock,
    elements=st.integers(1, 1000).map(lambda n: 1024 * n),
    affine=st.none() | st.builds(AffineForm, bits=st.sampled_from(AFFINE_BITS), group=st.sampled_from(AFFINE_GROUPS)),
    anew_group=st.none() | st.sampled_from([32, 64]),
)


FORMS: tuple[WeightsForm, ...] = ("dense", "stored", "8-bit", "4-bit")


@given(st.lists(blocks, max_size=8), st.sampled_from(get_args(Backend)), st.sampled_from(list(DTYPE_BYTES)))
def test_forms_never_grow_and_merging_changes_nothing(some: list[WeightBlock], backend: Backend, dtype: DType) -> None:
    def taken(these: Sequence[WeightBlock], weights: WeightsForm) -> int:
        return sum(block.loaded_bytes(backend, dtype, weights) for block in these)

    sizes = [taken(some, weights) for weights in FORMS]
    assert sizes == sorted(sizes, reverse=True)
    assert [taken(merge_blocks(some), weights) for weights in FORMS] == sizes
    assert len(merge_blocks(some)) == len({(block.affine, block.anew_group) for block in some})


def spec_of(checkpoint: MemoryCheckpoint) -> ModelSpec:
    return spec_from(checkpoint.config, checkpoint.tensors, file_bytes=1)


def test_a_spec_knows_each_part_and_survives_json(tmp_path: Path) -> None:
    spec = spec_of(quantized_checkpoint(tiny_model("llama_tied", 0), tmp_path))
    assert spec.is_current and spec.weights is not None
    assert ModelSpec.from_json(spec.to_json()) == spec
    for layer, params in zip(spec.weights.layers, spec.layer_params, strict=True):
        assert sum(block.elements for block in layer) == params
        assert {block.affine for block in layer} == {None, AffineForm(bits=4, group=32)}
    assert spec.weights.head == spec.weights.embed
    whole, first, last = (spec.stage_weights_bytes(*span, "bfloat16") for span in ((0, 4), (0, 2), (2, 4)))
    assert first + last - whole == spec.part_bytes("torch", "bfloat16", "stored").lm_head


def test_a_spec_of_an_older_potluck_is_taken_for_dense(tmp_path: Path) -> None:
    spec = spec_of(quantized_checkpoint(tiny_model("llama", 0), tmp_path))
    data = spec.to_json()
    del data["weights"]
    old = ModelSpec.from_json(data)
    assert not old.is_current
    for weights in get_args(WeightsForm):
        assert old.part_bytes("torch", "bfloat16", weights) == spec.part_bytes("torch", "bfloat16", "dense")


@pytest.mark.parametrize("weights", get_args(WeightsForm))
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "qwen3_moe", "gemma3_text", "phi3"])
@pytest.mark.parametrize("backend", get_args(Backend))
def test_stages_hold_what_is_planned_for_them(
    backend: Backend, family: str, weights: WeightsForm, tmp_path: Path
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    checkpoint = quantized_checkpoint(tiny_model(family, 0), tmp_path, bits=8)
    dense = memory_checkpoint(tiny_model(family, 0), tmp_path)
    for one in (checkpoint, dense):
        spec = spec_of(one)
        for first, last in ((0, NUM_LAYERS), (0, 2), (2, NUM_LAYERS)):
            shard = load_shard(
                one,
                StageSpec(
                    first=first,
                    last=last,
                    num_layers=NUM_LAYERS,
                    device="mlx" if backend == "mlx" else "cpu",
                    compute_dtype="float32",
                    wire_dtype="float32",
                    next_dtype="float32",
                    context_tokens=64,
                    kv_capacity_tokens=64,
                    weights=weights,
                ),
                backend=backend,
            )
            held = supported_form(backend, one.config, weights, stacked_experts=False)
            planned = spec.stage_weights_bytes(first, last, "float32", backend=backend, weights=held)
            # torch's kernels pad the rows of a matrix to whole tiles.
            assert planned <= shard.weights_bytes <= planned * 1.15


def test_a_view_in_a_form_and_the_bytes_agree(tmp_path: Path) -> None:
    checkpoint = memory_checkpoint(tiny_model("llama", 0), tmp_path)
    for weights in get_args(WeightsForm):
        for name, info in in_weights_form(checkpoint, weights).tensors.items():
            assert info.affine == loaded_form(checkpoint.tensors[name], weights)
            assert loaded_bytes(info, "mlx", "bfloat16") == loaded_bytes(
                checkpoint.tensors[name], "mlx", "bfloat16", weights
            )
    assert weight_block(checkpoint.tensors["model.norm.weight"]).anew_group is None
