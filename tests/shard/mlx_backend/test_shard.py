"""MLX shards give the logits of transformers' unsplit model; see test_parity.py for every split and mixed rings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from shard.mlx_backend.build import build_mlx_shard
from shard.mlx_backend.kv import ROLLBACK_TOKENS
from shard.stage import Batch
from tests.support.shard import tiny
from tests.support.shard.mlx_ring import Ring, checkpoint_of, error, shard_spec
from transport.errors import BadCheckpoint, BadMessage, UnsupportedModel
from transport.messages.ring import Entry, SequenceId

IDS = [int(i) for i in np.random.default_rng(7).integers(0, tiny.VOCAB_SIZE, size=120)]
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", [*tiny.CORE_FAMILIES, "smollm3", "olmo2", "phi3"])
def test_ragged_steps_give_the_unsplit_logits(family: str, tmp_path: Path) -> None:
    """Chunks, decodes, and both in one step, of three sequences of different lengths, beyond the window."""
    model, checkpoint = checkpoint_of(family, tmp_path)
    ids = {s: IDS[s * 20 : s * 20 + 40] for s in range(3)}
    wanted = {s: tiny.reference_logits(model, ids[s]) for s in ids}
    ring = Ring(checkpoint, (1, 3))
    lengths = dict.fromkeys(ids, 0)
    steps: list[dict[int, int]] = [{0: 13, 1: 5}, {0: 1, 1: 3, 2: 20}, *[{0: 1, 1: 1, 2: 1}] * 3, {1: 9, 2: 1, 0: 1}]
    for step in steps:
        logits = ring.step(*((s, lengths[s], ids[s][lengths[s] : lengths[s] + n]) for s, n in step.items()))
        for s, n in step.items():
            rows, logits = logits[:n], logits[n:]
            assert error(rows, wanted[s][lengths[s] : lengths[s] + n]) <= TOLERANCE
            lengths[s] += n
    assert [ring.shards[1].kv.length(SequenceId(s)) for s in ids] == [lengths[s] for s in ids]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scaled_ropes(family: str, rope: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, overrides = tiny.FAMILIES[family]
    monkeypatch.setitem(tiny.FAMILIES, family, (name, {**overrides, "rope_parameters": rope}))
    model, checkpoint = checkpoint_of(family, tmp_path)
    assert error(Ring(checkpoint, (2,)).step((0, 0, IDS)), tiny.reference_logits(model, IDS)) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_bfloat16_stays_close(family: str, tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(family, tmp_path)
    ring = Ring(checkpoint, (1, 3), dtype="bfloat16", wire="bfloat16")
    assert error(ring.step((0, 0, IDS[:40])), tiny.reference_logits(model, IDS[:40])) <= 0.05


def test_truncated_sequence_continues_as_if_never_longer(tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of("gemma3_text", tmp_path)
    ring = Ring(checkpoint, (2,))
    sequence = SequenceId(5)
    ring.step((5, 0, IDS[:60]))
    for shard in ring.shards:
        assert shard.kv.truncate(sequence, 40) == 40
    other = IDS[:40] + IDS[90:120]
    wanted = tiny.reference_logits(model, other)
    assert error(ring.step((5, 40, other[40:])), wanted[40:]) <= TOLERANCE


def test_a_window_goes_back_its_slack_at_least_and_then_says_no(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("mistral", tmp_path)
    ring = Ring(checkpoint)
    shard, sequence = ring.shards[0], SequenceId(1)
    ids = (IDS * 2)[: 2 * ROLLBACK_TOKENS]
    for start in range(0, 8 * ROLLBACK_TOKENS, len(ids)):
        ring.step((1, start, ids))
    length = shard.kv.length(sequence)
    assert shard.kv.truncate(sequence, length - ROLLBACK_TOKENS) == length - ROLLBACK_TOKENS
    assert shard.kv.truncate(sequence, tiny.WINDOW) == 0
    assert shard.kv.length(sequence) == 0


def test_release_frees_the_memory(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama", tmp_path)
    ring = Ring(checkpoint, (2,))
    ring.step((1, 0, IDS[:10]), (2, 0, IDS[:3]))
    shard = ring.shards[0]
    assert (shard.kv.num_sequences(), shard.kv.num_tokens()) == (2, 13)
    assert shard.kv.num_bytes() > 0
    for sequence in (1, 2, 3):
        shard.kv.release(SequenceId(sequence))
    assert (shard.kv.num_sequences(), shard.kv.num_tokens(), shard.kv.num_bytes()) == (0, 0, 0)


def test_entries_that_want_no_logits_still_fill_the_cache(tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of("qwen3", tmp_path)
    ring = Ring(checkpoint)
    silent = Entry(sequence=SequenceId(1), start=0, token_ids=tuple(IDS[:9]), num_logits=0)
    assert ring.shards[0].forward(Batch(entries=(silent,), hidden=None)).shape == (0, tiny.VOCAB_SIZE)
    assert error(ring.step((1, 9, IDS[9:12])), tiny.reference_logits(model, IDS[:12])[9:]) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text"])
def test_reads_its_own_tensors_once_and_no_others(family: str, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(family, tmp_path)
    seen: list[tuple[int, int]] = []
    shard = build_mlx_shard(checkpoint, shard_spec(1, 3), lambda done, total: seen.append((done, total)))
    own = {name for name in checkpoint.tensors if name.startswith(("model.layers.1.", "model.layers.2."))}
    assert checkpoint.reads == dict.fromkeys(own, 1)
    assert seen[-1][0] == seen[-1][1] == sum(checkpoint.tensors[name].file_bytes for name in own)
    assert shard.weights_bytes == checkpoint.spec.stage_weights_bytes(1, 3, "float32")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("mixtral", tmp_path)
    name = next(name for name in checkpoint.arrays if ".experts.2." in name)
    del checkpoint.arrays[name]
    with pytest.raises(BadCheckpoint, match=name):
        build_mlx_shard(checkpoint, shard_spec(0, 4))


def test_a_misshapen_tensor_is_named(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama", tmp_path)
    checkpoint.arrays["model.norm.weight"] = np.ones(63, np.float32)
    build_mlx_shard(checkpoint, shard_spec(0, 2))
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight"):
        build_mlx_shard(checkpoint, shard_spec(2, 4))


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """A bias that mlx-lm's class does not have would be left out, and the output wrong without a word."""
    _, checkpoint = checkpoint_of("qwen3", tmp_path)
    checkpoint.arrays["model.layers.1.self_attn.q_proj.bias"] = np.ones(64, np.float32)
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias"):
        build_mlx_shard(checkpoint, shard_spec(0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({"model_file": "model.py"}, "model_file"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_can_not_run_is_refused_by_name(change: dict[str, object], message: str, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama", tmp_path)
    checkpoint.config.update(change)
    with pytest.raises(UnsupportedModel, match=message):
        build_mlx_shard(checkpoint, shard_spec(0, 4))


def test_a_config_with_a_hole_is_refused_by_name(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama", tmp_path)
    del checkpoint.config["intermediate_size"]
    with pytest.raises(BadCheckpoint, match="intermediate_size"):
        build_mlx_shard(checkpoint, shard_spec(0, 4))


def test_ids_beyond_the_vocabulary_never_reach_the_embedding(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama", tmp_path)
    with pytest.raises(BadMessage, match=str(tiny.VOCAB_SIZE)):
        Ring(checkpoint).step((0, 0, [3, tiny.VOCAB_SIZE]))


def test_hidden_states_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama", tmp_path)
    shard = build_mlx_shard(checkpoint, shard_spec(1, 2))
    entry = Entry(sequence=SequenceId(1), start=0, token_ids=(1, 2), num_logits=0)
    with pytest.raises(BadMessage, match="63"):
        shard.forward(Batch(entries=(entry,), hidden=np.zeros((2, 63), np.float32)))
