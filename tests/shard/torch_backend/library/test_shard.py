"""What torch's library path promises beyond parity: KV that shrinks and frees, windows, isolation, refusals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shard.formats.families import family_of
from shard.stage import Batch
from shard.torch_backend.attention import RaggedStep, Run, ragged_attention
from shard.torch_backend.build import build_torch_shard
from shard.torch_backend.kv import ROLLBACK_TOKENS, LayerKV, SequenceKV
from shard.torch_backend.library.shard import LibraryShard, _ParameterReader
from shard.torch_backend.tensors import TensorNames
from tests.support.shard.stage_runner import load_stage, random_prompts, relative_error, run_step, tiny_spec
from tests.support.shard.tiny import (
    WINDOW,
    MemoryCheckpoint,
    memory_checkpoint,
    reference_logits,
    tiny_config,
    tiny_model,
)
from transport.errors import BadCheckpoint, ConfigError, DoesNotFit, StageFailed, UnsupportedModel
from transport.messages.ring import Entry, SequenceId

ONE, TWO = SequenceId(1), SequenceId(2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MemoryCheckpoint]:
    made: dict[str, MemoryCheckpoint] = {}

    def make(family: str) -> MemoryCheckpoint:
        if family not in made:
            made[family] = memory_checkpoint(tiny_model(family, 1), tmp_path_factory.mktemp(family))
        return made[family]

    return make


Tiny = Callable[[str], MemoryCheckpoint]


def whole(checkpoint: MemoryCheckpoint, **changes: Any) -> LibraryShard:
    shard = load_stage(checkpoint, tiny_spec(0, 4, **changes), "library")
    assert isinstance(shard, LibraryShard)
    return shard


def feed(shard: LibraryShard, ids: list[int], start: int, end: int, sequence: SequenceId = ONE) -> np.ndarray:
    return run_step([shard], [Entry(sequence, start, tuple(ids[start:end]), end - start)])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_truncated_positions_leave_no_trace(tiny: Tiny, family: str) -> None:
    ids = random_prompts(4, [60])[ONE]
    reference = reference_logits(tiny_model(family, 1), ids)
    shard = whole(tiny(family))
    feed(shard, ids, 0, 40)
    feed(shard, [*ids[:40], *[3] * 20], 40, 60)
    assert shard.kv.truncate(ONE, 40) == 40
    assert shard.kv.length(ONE) == 40
    assert relative_error(feed(shard, ids, 40, 60), reference[40:]) < 1e-5


def test_truncating_further_than_held_changes_nothing(tiny: Tiny) -> None:
    shard = whole(tiny("llama"))
    feed(shard, [5] * 9, 0, 9)
    assert shard.kv.truncate(ONE, 30) == 9
    assert shard.kv.truncate(TWO, 3) == 0


@pytest.mark.parametrize("chunk", [1, 7, ROLLBACK_TOKENS + 30])
def test_a_sliding_window_keeps_little_and_goes_back_by_its_slack(tiny: Tiny, chunk: int) -> None:
    length = 3 * ROLLBACK_TOKENS
    ids = random_prompts(6, [length])[ONE]
    config = {**tiny("mistral").config, "max_position_embeddings": 1024}
    checkpoint = MemoryCheckpoint(spec=tiny("mistral").spec, config=config, arrays=tiny("mistral").arrays)
    shard = whole(checkpoint, context_tokens=1024)
    reference = reference_logits(tiny_model("mistral", 1), ids)
    rows = [feed(shard, ids, start, min(length, start + chunk)) for start in range(0, length, chunk)]
    assert relative_error(np.concatenate(rows), reference) < 1e-5
    bytes_per_position = 4 * 2 * 2 * 16 * 4
    assert shard.kv.num_bytes() <= (WINDOW + 2 * ROLLBACK_TOKENS) * bytes_per_position
    assert shard.kv.truncate(ONE, length - ROLLBACK_TOKENS) == length - ROLLBACK_TOKENS
    assert relative_error(feed(shard, ids, length - ROLLBACK_TOKENS, length), reference[-ROLLBACK_TOKENS:]) < 1e-5
    assert shard.kv.truncate(ONE, 20) == 0
    assert (shard.kv.length(ONE), shard.kv.num_bytes()) == (0, 0)


def test_release_frees_memory(tiny: Tiny) -> None:
    shard = whole(tiny("llama"))
    run_step([shard], [Entry(ONE, 0, (5, 6, 7), 1), Entry(TWO, 0, (8, 9), 1)])
    assert (shard.kv.num_sequences(), shard.kv.num_tokens()) == (2, 5)
    shard.kv.release(ONE)
    shard.kv.release(SequenceId(77))
    assert (shard.kv.num_sequences(), shard.kv.num_tokens()) == (1, 2)
    shard.kv.release(TWO)
    assert (shard.kv.num_sequences(), shard.kv.num_tokens(), shard.kv.num_bytes()) == (0, 0, 0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_sequence_does_not_depend_on_who_is_in_the_batch(tiny: Tiny, family: str) -> None:
    prompts = random_prompts(8, [30, 19, 25])
    alone, together = whole(tiny(family)), whole(tiny(family))
    for start, end in ((0, 11), (11, 12), (12, 19)):
        entries = [Entry(sequence, start, tuple(ids[start:end]), end - start) for sequence, ids in prompts.items()]
        rows = run_step([together], entries)
        for index, entry in enumerate(entries):
            got = rows[index * (end - start) : (index + 1) * (end - start)]
            assert relative_error(got, run_step([alone], [entry])) < 1e-5


def test_a_step_that_fails_leaves_the_sequences_as_they_were(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_prompts(4, [40])[ONE]
    reference = reference_logits(tiny_model("llama", 1), ids)
    shard = whole(tiny("llama"))
    feed(shard, ids, 0, 20)

    def out_of_memory(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999 bytes")

    with monkeypatch.context() as patched:
        patched.setattr(shard._model.model.layers[2].mlp, "forward", out_of_memory)
        with pytest.raises(StageFailed, match="ran out of memory in a step of 5 tokens") as failure:
            feed(shard, ids, 20, 25)
        assert "--context" in failure.value.hint
    assert shard.kv.length(ONE) == 20
    assert relative_error(feed(shard, ids, 20, 40), reference[20:]) < 1e-5


def test_a_failed_step_that_moved_a_window_leaves_nothing_half_done(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_prompts(4, [ROLLBACK_TOKENS + 100])[ONE]
    reference = reference_logits(tiny_model("mistral", 1), ids)
    shard = whole(tiny("mistral"))
    feed(shard, ids, 0, 40)

    def broken(*arguments: Any, **named: Any) -> None:
        raise ValueError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(shard._model.model.layers[2].mlp, "forward", broken)
        with pytest.raises(ValueError, match="broken"):
            feed(shard, ids, 40, len(ids))
    assert (shard.kv.length(ONE), shard.kv.num_bytes()) == (0, 0)
    assert relative_error(feed(shard, ids, 0, len(ids)), reference) < 1e-5


def test_half_precision_wire_carries_bits(tiny: Tiny) -> None:
    """bfloat16 compute and wire stay within what 8 bits of mantissa allow over four layers."""
    ids = random_prompts(4, [20])[ONE]
    reference = reference_logits(tiny_model("llama", 1), ids)
    bf16 = {"compute_dtype": "bfloat16", "wire_dtype": "bfloat16", "next_dtype": "bfloat16"}
    stages = [load_stage(tiny("llama"), tiny_spec(a, b, **bf16), "library") for a, b in ((0, 2), (2, 4))]
    entry = Entry(ONE, 0, tuple(ids), 20)
    hidden = stages[0].forward(Batch(entries=(entry,), hidden=None))
    assert hidden.dtype == np.uint16
    hidden.flags.writeable = False  # as it comes off a socket
    logits = stages[1].forward(Batch(entries=(entry,), hidden=hidden))
    assert logits.dtype == np.float32
    assert relative_error(logits, reference) < 0.05


def test_a_stage_reads_its_own_tensors_once_and_nothing_else(tiny: Tiny) -> None:
    for family, first, last in (("llama_tied", 0, 4), ("llama_tied", 0, 2), ("llama_tied", 2, 4), ("mixtral", 1, 3)):
        checkpoint = tiny(family)
        checkpoint.reads.clear()
        calls: list[tuple[int, int]] = []
        shard = build_torch_shard(
            checkpoint,
            tiny_spec(first, last),
            lambda done, total, calls=calls: calls.append((done, total)),  # type: ignore[misc]
            path="library",
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


def test_other_devices_are_filled_by_way_of_one_host_buffer(tiny: Tiny) -> None:
    """The way to cuda and mps, taken with parameters that a CPU can look at."""
    checkpoint = tiny("mixtral")
    reader = _ParameterReader(checkpoint, tiny_spec(0, 4, compute_dtype="bfloat16"), torch.device("meta"))
    names = TensorNames(
        checkpoint.tensors, first=0, tied_embeddings=False, experts=family_of(checkpoint.config).experts
    )
    for name in ("model.layers.2.mlp.experts.gate_up_proj", "model.norm.weight", "lm_head.weight"):
        wanted = tiny_model("mixtral", 1).get_parameter(name).to(torch.bfloat16)
        parameter = torch.full_like(wanted, torch.nan, requires_grad=False)
        for part in names.parts(name, tuple(wanted.shape)):
            reader.read(part, parameter)
        assert torch.equal(parameter, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mixtral"])
def test_a_gpu_gives_the_same_logits(tiny: Tiny, family: str) -> None:
    ids = random_prompts(4, [60])[ONE]
    reference = reference_logits(tiny_model(family, 1), ids)
    stages = [load_stage(tiny(family), tiny_spec(a, b, device="cuda:0"), "library") for a, b in ((0, 2), (2, 4))]
    bounds = (0, 25, 40, *range(41, 61))
    steps = [Entry(ONE, a, tuple(ids[a:b]), b - a) for a, b in pairwise(bounds)]
    rows = np.concatenate([run_step(stages, [entry]) for entry in steps])
    assert relative_error(rows, reference) < 1e-4


def changed(checkpoint: MemoryCheckpoint, config: dict[str, Any], **arrays: np.ndarray | None) -> MemoryCheckpoint:
    kept = {name: array for name, array in {**checkpoint.arrays, **arrays}.items() if array is not None}
    return MemoryCheckpoint(spec=checkpoint.spec, config={**checkpoint.config, **config}, arrays=kept)


def test_a_missing_or_misshapen_tensor_is_named_before_anything_is_read(tiny: Tiny) -> None:
    up = "model.layers.2.mlp.up_proj.weight"
    missing = changed(tiny("llama"), {}, **{up: None})
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        whole(missing)
    assert missing.reads == {}
    load_stage(missing, tiny_spec(0, 2), "library")  # another stage's tensor is not missed
    with pytest.raises(BadCheckpoint, match=r"up_proj\.weight has shape \[3, 64\].*\[96, 64\]"):
        whole(changed(tiny("llama"), {}, **{up: np.zeros((3, 64), np.float32)}))
    expert = "model.layers.3.block_sparse_moe.experts.2.w3.weight"
    with pytest.raises(BadCheckpoint, match=r"layers\.3\..*experts\.2"):
        whole(changed(tiny("mixtral"), {}, **{expert: None}))
    with pytest.raises(BadCheckpoint, match="lm_head"):
        whole(changed(tiny("llama"), {}, **{"lm_head.weight": None}))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"model_type": "bloom"}, UnsupportedModel, "can't run the architecture bloom"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModel, "quantized with awq"),
        ({"num_hidden_layers": 5}, BadCheckpoint, "4 layers, config.json 5"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            UnsupportedModel,
            "dynamic rotary",
        ),
    ],
)
def test_models_that_cannot_run_are_refused(
    tiny: Tiny, config: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        whole(changed(tiny("llama"), config))


def test_longrope_is_refused_only_where_its_scaling_would_switch(tiny: Tiny) -> None:
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    rope["original_max_position_embeddings"] = 128
    config = {"rope_parameters": rope, "original_max_position_embeddings": 128}
    whole(changed(tiny("phi3"), config), context_tokens=128)
    with pytest.raises(UnsupportedModel, match="up to 128 tokens"):
        whole(changed(tiny("phi3"), config), context_tokens=129)


def test_a_device_that_is_not_there_is_a_config_error(tiny: Tiny) -> None:
    for device in ("cuda:0", "nonsense"):
        if device == "cuda:0" and torch.cuda.is_available():
            continue
        with pytest.raises(ConfigError, match=device):
            whole(tiny("llama"), device=device)


def test_no_memory_while_loading_is_said_with_numbers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty_like", no_memory)
    with pytest.raises(DoesNotFit, match=r"no memory left for model\.embed_tokens\.weight"):
        whole(tiny("llama"))


class _Module(torch.nn.Module):
    layer_idx = 0


def attend(**named: Any) -> torch.Tensor:
    step = RaggedStep([Run(kv=SequenceKV(), offset=0, num_tokens=3, start=0)])
    tensors = [torch.zeros(1, heads, 3, 4) for heads in (4, 2, 2)]
    return ragged_attention(_Module(), *tensors, None, ragged_step=step, **named)[0]


@pytest.mark.parametrize(
    "named", [{"alibi": torch.zeros(4)}, {"head_mask": None}, {"dropout": 0.1}, {"is_causal": False}]
)
def test_attention_refuses_what_it_does_not_know(named: dict[str, Any]) -> None:
    assert attend(scaling=0.5, sliding_window=None).shape == (1, 3, 4, 4)
    with pytest.raises(UnsupportedModel, match="_Module asks for attention features"):
        attend(**named)


def test_bidirectional_models_are_refused(tiny: Tiny) -> None:
    shard = whole(changed(tiny("gemma3_text"), {"use_bidirectional_attention": True}))
    with pytest.raises(UnsupportedModel, match="bidirectional"):
        feed(shard, [5, 6], 0, 2)


def test_a_layer_that_attends_twice_or_never_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = whole(tiny("llama"))
    layers = shard._model.model.layers
    with monkeypatch.context() as patched:
        patched.setattr(layers[1].self_attn, "layer_idx", 0)
        with pytest.raises(UnsupportedModel, match="attends twice in layer 0"):
            feed(shard, [5, 6], 0, 2)
    with monkeypatch.context() as patched:
        patched.setattr(layers[3].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
        with pytest.raises(UnsupportedModel, match=r"layers \[3\]"):
            feed(shard, [5, 6], 0, 2)


def test_kv_grows_without_losing_rows() -> None:
    layer = LayerKV(None)
    rows = torch.arange(500.0)[None, :, None].expand(2, 500, 3)
    position = 0
    for size in (1, 1, 70, 1, 200, 5, 222):
        keys, values, first = layer.append(
            position, rows[:, position : position + size], -rows[:, position : position + size]
        )
        position += size
        assert first == 0
        assert torch.equal(keys, rows[:, :position])
        assert torch.equal(values, -rows[:, :position])
    assert layer.num_bytes() <= 2 * 2 * 3 * 4 * (500 * 1.25 + 64)


def test_checkpoints_of_vision_models_give_their_text_part(tiny: Tiny) -> None:
    source = tiny("gemma3_text")
    arrays = {f"language_model.{name}": array for name, array in source.arrays.items()}
    config = {"model_type": "gemma3", "text_config": tiny_config("gemma3_text").to_dict()}
    wrapped = MemoryCheckpoint(spec=source.spec, config=config, arrays=arrays)
    ids = list(range(5, 15))
    assert np.array_equal(feed(whole(wrapped), ids, 0, 10), feed(whole(source), ids, 0, 10))


def test_saved_folder_is_not_needed_after_loading(tmp_path: Path) -> None:
    checkpoint = memory_checkpoint(tiny_model("llama", 1), tmp_path)
    shard = whole(checkpoint)
    checkpoint.close()
    assert feed(shard, [5, 6, 7], 0, 3).shape == (3, 128)
