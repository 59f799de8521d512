"""What the fused path promises beyond parity (test_parity.py): isolation, KV that goes back, loading, refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shard.formats.affine import AffineRows
from shard.formats.families import why_not_fused
from shard.stage import Batch
from shard.torch_backend.build import build_torch_shard
from shard.torch_backend.fused import build
from shard.torch_backend.fused.shard import FusedShard
from shard.torch_backend.kv import ROLLBACK_TOKENS
from shard.worker.load import load_shard
from tests.support.shard.stage_runner import Runner, load_stage, random_prompts, relative_error, run_step, tiny_spec
from tests.support.shard.tiny import (
    FAMILIES,
    WINDOW,
    MemoryCheckpoint,
    memory_checkpoint,
    quantized_checkpoint,
    reference_logits,
    save_tiny,
    tiny_config,
    tiny_model,
)
from transport.errors import BadCheckpoint, DoesNotFit, StageFailed, UnsupportedModel
from transport.messages.ring import Entry, SequenceId

ONE, TWO = SequenceId(1), SequenceId(2)
LEAN_FAMILIES = [family for family in FAMILIES if why_not_fused(tiny_config(family).to_dict()) is None]
BF16 = {"compute_dtype": "bfloat16", "wire_dtype": "bfloat16", "next_dtype": "bfloat16"}

Tiny = Callable[[str], MemoryCheckpoint]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made: dict[str, MemoryCheckpoint] = {}

    def make(family: str) -> MemoryCheckpoint:
        if family not in made:
            made[family] = memory_checkpoint(tiny_model(family, 1), tmp_path_factory.mktemp(family))
        return made[family]

    return make


def whole(checkpoint: MemoryCheckpoint, **changes: Any) -> FusedShard:
    shard = load_stage(checkpoint, tiny_spec(0, 4, **changes), "fused")
    assert isinstance(shard, FusedShard)
    return shard


def changed(checkpoint: MemoryCheckpoint, config: dict[str, Any], **arrays: np.ndarray | None) -> MemoryCheckpoint:
    kept = {name: array for name, array in {**checkpoint.arrays, **arrays}.items() if array is not None}
    return MemoryCheckpoint(spec=checkpoint.spec, config={**checkpoint.config, **config}, arrays=kept)


def feed(shard: FusedShard, ids: list[int], start: int, end: int, sequence: SequenceId = ONE) -> np.ndarray:
    return run_step([shard], [Entry(sequence, start, tuple(ids[start:end]), end - start)])


def in_small_steps(shard: FusedShard, ids: list[int]) -> np.ndarray:
    """Logits of all ids: two chunks, then one at a time."""
    bounds = (0, 7, 12, *range(13, len(ids) + 1))
    return np.concatenate([feed(shard, ids, start, end) for start, end in pairwise(bounds)])


def test_the_mainstream_families_take_the_lean_path(tiny: Tiny) -> None:
    assert set(FAMILIES) - set(LEAN_FAMILIES) == {"gpt_oss"}
    assert build_torch_shard(tiny("llama"), tiny_spec(0, 4), lambda read, total: None).path == "fused"
    assert build_torch_shard(tiny("gpt_oss"), tiny_spec(0, 4), lambda read, total: None).path == "library"
    assert isinstance(load_shard(tiny("qwen3"), tiny_spec(0, 2), backend="torch"), FusedShard)


@pytest.mark.parametrize(
    ("family", "config", "match"),
    [
        ("llama", {"a_feature_of_next_year": 3}, "a_feature_of_next_year"),
        ("llama", {"attention_chunk_size": 8192}, "attention_chunk_size"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama", {"hidden_act": "relu"}, "activation relu"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "type mrope"),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("llama", {"model_type": "bloom"}, "bloom"),
    ],
)
def test_what_it_does_not_know_is_left_to_the_library(
    tiny: Tiny, family: str, config: dict[str, Any], match: str
) -> None:
    reason = why_not_fused({**tiny(family).config, **config})
    assert reason is not None and match in reason
    with pytest.raises(UnsupportedModel, match=match):
        whole(changed(tiny(family), config))


def test_it_is_loaded_without_most_of_torch(tmp_path: Path) -> None:
    """In a process of its own: in this one everything has been imported long since."""
    script = """
import sys
from pathlib import Path
from shard.worker.load import load_shard
from shard.pieces.open import open_checkpoint
from shard.stage import StageSpec

dtypes = dict.fromkeys(("compute_dtype", "wire_dtype", "next_dtype"), "float32")
spec = StageSpec(first=0, last=4, num_layers=4, device="cpu", context_tokens=256, kv_capacity_tokens=256, **dtypes)
loaded = load_shard(open_checkpoint(Path(sys.argv[1])), spec, backend="torch")
print(loaded.path, *(name in sys.modules for name in ("torch", "torch._dynamo", "transformers.activations")))
from transformers import LlamaForCausalLM
print(LlamaForCausalLM.__name__)
"""
    command = [sys.executable, "-c", script, str(save_tiny("llama", 1, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.split() == ["fused", "True", "False", "False", "LlamaForCausalLM"], done.stderr


def test_experts_stacked_in_one_tensor_are_left_to_the_library(tiny: Tiny) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(UnsupportedModel, match=r"mlp\.experts\.gate_up_proj"):
        whole(changed(tiny("qwen3_moe"), {}, **{name: np.zeros((4, 96, 64), np.float32)}))


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "linear": ("llama", {"rope_type": "linear", "factor": 3.0}),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "partial": ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6],
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 0.5,
        },
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_and_partial_rotary_embeddings_are_the_library_s(tiny: Tiny, kind: str) -> None:
    family, rope = ROPES[kind]
    config = {"rope_parameters": {**rope, "rope_theta": 1e4}}
    checkpoint = changed(tiny(family), config)
    ids = random_prompts(3, [40])[ONE]
    library = load_stage(checkpoint, tiny_spec(0, 4, context_tokens=128), "library")
    wanted = run_step([library], [Entry(ONE, 0, tuple(ids), len(ids))])
    assert relative_error(in_small_steps(whole(checkpoint, context_tokens=128), ids), wanted) < 1e-5
    plain = run_step([whole(tiny(family))], [Entry(ONE, 0, tuple(ids), len(ids))])
    assert relative_error(plain, wanted) > 1e-3


@pytest.mark.parametrize("family", ["llama", "smollm3", "granite"])
def test_biases_are_added_everywhere_the_config_says(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.attention_bias = config.mlp_bias = True
    model = type(tiny_model(family, 1))(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    ids = random_prompts(3, [20])[ONE]
    shard = whole(memory_checkpoint(model, tmp_path))
    assert relative_error(in_small_steps(shard, ids), reference_logits(model, ids)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_truncated_positions_leave_no_trace(tiny: Tiny, family: str) -> None:
    ids = random_prompts(4, [60])[ONE]
    reference = reference_logits(tiny_model(family, 1), ids)
    shard = whole(tiny(family))
    feed(shard, ids, 0, 40)
    feed(shard, [*ids[:40], *[3] * 20], 40, 60)
    assert shard.kv.truncate(ONE, 40) == shard.kv.length(ONE) == 40
    assert relative_error(feed(shard, ids, 40, 60), reference[40:]) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, ROLLBACK_TOKENS + 30])
def test_a_sliding_window_keeps_little_and_goes_back_by_its_slack(tiny: Tiny, chunk: int) -> None:
    length = 3 * ROLLBACK_TOKENS
    ids = random_prompts(6, [length])[ONE]
    shard = whole(changed(tiny("mistral"), {"max_position_embeddings": 1024}), context_tokens=1024)
    reference = reference_logits(tiny_model("mistral", 1), ids)
    rows = [feed(shard, ids, start, min(length, start + chunk)) for start in range(0, length, chunk)]
    assert relative_error(np.concatenate(rows), reference) < 1e-5
    assert shard.kv.num_bytes() <= (WINDOW + 2 * ROLLBACK_TOKENS) * (4 * 2 * 2 * 16 * 4)
    assert shard.kv.truncate(ONE, length - ROLLBACK_TOKENS) == length - ROLLBACK_TOKENS
    assert relative_error(feed(shard, ids, length - ROLLBACK_TOKENS, length), reference[-ROLLBACK_TOKENS:]) < 1e-5
    assert shard.kv.truncate(ONE, 20) == 0
    assert (shard.kv.length(ONE), shard.kv.num_bytes()) == (0, 0)


def test_release_frees_memory(tiny: Tiny) -> None:
    shard = whole(tiny("llama"))
    run_step([shard], [Entry(ONE, 0, (5, 6, 7), 1), Entry(TWO, 0, (8, 9), 1)])
    assert (shard.kv.num_sequences(), shard.kv.num_tokens()) == (2, 5)
    shard.kv.release(ONE)
    shard.kv.release(TWO)
    assert (shard.kv.num_sequences(), shard.kv.num_tokens(), shard.kv.num_bytes()) == (0, 0, 0)


def test_a_step_that_fails_leaves_the_sequences_as_they_were(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_prompts(4, [40])[ONE]
    reference = reference_logits(tiny_model("llama", 1), ids)
    shard = whole(tiny("llama"))
    feed(shard, ids, 0, 20)

    def out_of_memory(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999 bytes")

    for end in (21, 25):
        with monkeypatch.context() as patched:
            patched.setattr(type(shard._model.layers[2].mlp), "__call__", out_of_memory)
            with pytest.raises(StageFailed, match=f"ran out of memory in a step of {end - 20} tokens"):
                feed(shard, ids, 20, end)
        assert shard.kv.length(ONE) == 20
    assert relative_error(feed(shard, ids, 20, 40), reference[20:]) < 1e-5


def test_a_failed_step_that_moved_a_window_leaves_nothing_half_done(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_prompts(4, [2 * ROLLBACK_TOKENS + 100])[ONE]
    shard = whole(tiny("mistral"))
    feed(shard, ids, 0, 40)

    def broken(*arguments: Any, **named: Any) -> None:
        raise ValueError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(type(shard._model.layers[2].mlp), "__call__", broken)
        with pytest.raises(ValueError, match="broken"):
            feed(shard, ids, 40, len(ids))
    assert (shard.kv.length(ONE), shard.kv.num_bytes()) == (0, 0)
    assert relative_error(feed(shard, ids, 0, len(ids)), reference_logits(tiny_model("mistral", 1), ids)) < 1e-5


@pytest.mark.parametrize("family", LEAN_FAMILIES)
def test_a_sequence_does_not_depend_on_who_is_in_the_batch(family: str, tmp_path: Path) -> None:
    """To the bit where matrices are quantized; dense fp32 ones are torch's, which rounds by the number of rows."""
    model = tiny_model(family, 1)
    prompts = random_prompts(8, [30, 19, 25])
    for checkpoint, tolerance in (
        # A matrix with columns that no group divides stays dense, and qwen3_moe's experts have such.
        (quantized_checkpoint(model, tmp_path), 1e-4 if family == "qwen3_moe" else 0.0),
        (memory_checkpoint(model, tmp_path), 3e-6),
    ):
        alone, together = whole(checkpoint), whole(checkpoint)
        bounds = {
            SequenceId(1): (0, 11, 12, 13, 19),
            SequenceId(2): (0, 1, 2, 10, 11),
            SequenceId(3): (0, 6, 12, 13, 14),
        }
        for step in range(4):
            entries = [
                Entry(sequence, bounds[sequence][step], tuple(ids[slice(*bounds[sequence][step : step + 2])]), 1)
                for sequence, ids in prompts.items()
            ]
            rows = run_step([together], entries)
            for index, entry in enumerate(entries):
                assert relative_error(rows[index : index + 1], run_step([alone], [entry])) <= tolerance


def test_rows_go_back_in_the_order_of_the_entries(tiny: Tiny) -> None:
    prompts = random_prompts(2, [12, 12, 12])
    alone = [load_stage(tiny("llama"), tiny_spec(a, b), "fused") for a, b in ((0, 2), (2, 4))]
    together = [load_stage(tiny("llama"), tiny_spec(a, b), "fused") for a, b in ((0, 2), (2, 4))]
    for starts, num_logits in (((0, 0, 0), 1), ((5, 1, 4), 2)):
        sizes = (5, 1, 4) if starts == (0, 0, 0) else (3, 1, 2)
        entries = [
            Entry(sequence, start, tuple(ids[start : start + size]), min(size, num_logits))
            for (sequence, ids), start, size in zip(prompts.items(), starts, sizes, strict=True)
        ]
        hidden = together[0].forward(Batch(entries=tuple(entries), hidden=None))
        logits = together[1].forward(Batch(entries=tuple(entries), hidden=hidden))
        wanted_hidden = [alone[0].forward(Batch(entries=(entry,), hidden=None)) for entry in entries]
        wanted = [
            alone[1].forward(Batch(entries=(entry,), hidden=one))
            for entry, one in zip(entries, wanted_hidden, strict=True)
        ]
        assert relative_error(hidden, np.concatenate(wanted_hidden)) < 1e-5
        assert relative_error(logits, np.concatenate(wanted)) < 1e-5


def test_an_empty_batch_gives_no_rows(tiny: Tiny) -> None:
    first, last = (load_stage(tiny("llama"), tiny_spec(a, b, **BF16), "fused") for a, b in ((0, 2), (2, 4)))
    assert first.forward(Batch(entries=(), hidden=None)).shape == (0, 64)
    assert last.forward(Batch(entries=(), hidden=None)).shape == (0, 128)


@pytest.mark.parametrize("family", LEAN_FAMILIES)
def test_bfloat16_is_as_close_to_fp32_as_the_library_s(family: str, tmp_path: Path) -> None:
    """The median row of four models: in bf16 a router with a near-tie may choose another expert, on either path, and
    such a row and all that look at it are far off. Which path that hits in one model is chance."""
    ids = random_prompts(4, [20])[ONE]
    entry = Entry(ONE, 0, tuple(ids), len(ids))
    errors: dict[Runner, list[np.ndarray]] = {"library": [], "fused": []}
    for seed in range(1, 5):
        model = tiny_model(family, seed)
        checkpoint = memory_checkpoint(model, tmp_path)
        reference = reference_logits(model, ids)
        for runner, found in errors.items():
            stages = [load_stage(checkpoint, tiny_spec(a, b, **BF16), runner) for a, b in ((0, 2), (2, 4))]
            hidden = stages[0].forward(Batch(entries=(entry,), hidden=None))
            assert hidden.dtype == np.uint16
            hidden.flags.writeable = False  # as it comes off a socket
            logits = stages[1].forward(Batch(entries=(entry,), hidden=hidden))
            found.append(np.linalg.norm(logits - reference, axis=1) / np.linalg.norm(reference, axis=1))
    assert np.median(errors["fused"]) < 1.1 * np.median(errors["library"])


def test_a_stage_reads_its_own_tensors_once_and_nothing_else(tiny: Tiny) -> None:
    for family, first, last in (("llama_tied", 0, 4), ("llama_tied", 0, 2), ("llama_tied", 2, 4), ("mixtral", 1, 3)):
        checkpoint = tiny(family)
        checkpoint.reads.clear()
        calls: list[tuple[int, int]] = []
        shard = build_torch_shard(
            checkpoint,
            tiny_spec(first, last),
            lambda done, total, calls=calls: calls.append((done, total)),  # type: ignore[misc]
            path="fused",
        )
        wanted = {
            name
            for name in checkpoint.arrays
            if (name.startswith("model.layers.") and first <= int(name.split(".")[2]) < last)
            or (name == "model.embed_tokens.weight" and (first == 0 or (last == 4 and family == "llama_tied")))
            or (name == "model.norm.weight" and last == 4)
        }
        assert checkpoint.reads == dict.fromkeys(wanted, 1)
        num_bytes = sum(checkpoint.arrays[name].nbytes for name in wanted)
        assert shard.weights_bytes == num_bytes == checkpoint.spec.stage_weights_bytes(first, last, "float32")
        assert calls[0] == (0, num_bytes)
        assert calls[-1] == (num_bytes, num_bytes)
        assert calls == sorted(calls)


def test_a_missing_or_misshapen_tensor_is_named_before_anything_is_read(tiny: Tiny) -> None:
    up = "model.layers.2.mlp.up_proj.weight"
    missing = changed(tiny("llama"), {}, **{up: None})
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        whole(missing)
    assert missing.reads == {}
    load_stage(missing, tiny_spec(0, 2), "fused")  # another stage's tensor is not missed
    with pytest.raises(BadCheckpoint, match=r"up_proj\.weight has shape \[3, 64\].*\[96, 64\]"):
        whole(changed(tiny("llama"), {}, **{up: np.zeros((3, 64), np.float32)}))
    with pytest.raises(BadCheckpoint, match=r"layers\.3\..*experts\.2"):
        whole(changed(tiny("mixtral"), {}, **{"model.layers.3.block_sparse_moe.experts.2.w3.weight": None}))
    with pytest.raises(BadCheckpoint, match="lm_head"):
        whole(changed(tiny("llama"), {}, **{"lm_head.weight": None}))
    with pytest.raises(BadCheckpoint, match=r"4 layers, config\.json 5"):
        whole(changed(tiny("llama"), {"num_hidden_layers": 5}))


@pytest.mark.parametrize(
    ("loader", "tensor"),
    [("load_embedding_table", "model.embed_tokens.weight"), ("load_linear", "model.layers.0.self_attn.q_proj.weight")],
)
def test_no_memory_while_loading_is_said_with_the_tensor(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, loader: str, tensor: str
) -> None:
    def no_memory(*arguments: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build, loader, no_memory)
    with pytest.raises(DoesNotFit, match=re.escape(f"no memory left for {tensor}")):
        whole(tiny("llama"))


def test_checkpoints_of_vision_models_give_their_text_part(tiny: Tiny) -> None:
    text = tiny("gemma3_text")
    arrays = {f"language_model.{name}": array for name, array in text.arrays.items()}
    config = {"model_type": "gemma3", "text_config": tiny_config("gemma3_text").to_dict()}
    wrapped = MemoryCheckpoint(spec=text.spec, config=config, arrays=arrays)
    ids = list(range(5, 15))
    assert np.array_equal(feed(whole(wrapped), ids, 0, 10), feed(whole(text), ids, 0, 10))


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "phi3"])
def test_quantized_matrices_give_the_logits_of_their_numbers(family: str, tmp_path: Path) -> None:
    """Kernels hold scales in float16, as GGUF's are: these are rounded to it before, so that only the kernels err."""
    checkpoint = quantized_checkpoint(tiny_model(family, 1), tmp_path)
    for name, (form, rows) in checkpoint.affine.items():
        scales, biases = (numbers.astype(np.float16).astype(np.float32) for numbers in (rows.scales, rows.biases))
        checkpoint.affine[name] = (form, AffineRows(q=rows.q, scales=scales, biases=biases))
        checkpoint.arrays[name] = checkpoint.affine[name][1].dequantized()
    dense = MemoryCheckpoint(spec=checkpoint.spec, config=checkpoint.config, arrays=checkpoint.arrays)
    ids = random_prompts(5, [30])[ONE]
    wanted = run_step([load_stage(dense, tiny_spec(0, 4), "library")], [Entry(ONE, 0, tuple(ids), len(ids))])
    shard = whole(checkpoint)
    assert shard.weights_bytes < whole(dense).weights_bytes / 3
    assert relative_error(in_small_steps(shard, ids), wanted) < 5e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", LEAN_FAMILIES)
def test_a_gpu_gives_the_same_logits(tiny: Tiny, family: str) -> None:
    ids = random_prompts(4, [40])[ONE]
    reference = reference_logits(tiny_model(family, 1), ids)
    assert relative_error(in_small_steps(whole(tiny(family), device="cuda:0"), ids), reference) < 1e-4
