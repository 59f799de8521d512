"""Real quantized models on the kernels for quantized weights: their greedy text is that of the numbers in the file, up
to a near-tie. What each finds is printed (pytest -s).

SmolLM2 always; Gemma-3-270M where POTLUCK_TEST_GEMMA names its folder in a store (`make test-gemma GEMMA=…`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shard.formats.checkpoint import Checkpoint
from shard.formats.spec import Backend
from shard.pieces.open import open_checkpoint
from shard.stage import Batch, ShardBackend, StageSpec
from shard.worker.load import load_shard
from transport.messages.ring import DType, Entry, SequenceId

NUM_TOKENS = 64
MIXED_TOKENS = 24
NEAR_TIE = 1e-3
BF16_NEAR_TIE = 0.5
PROMPT = "Explain in a few sentences why the sky is blue."
CONTINUED = "The lighthouse stood at the northern end of the island, and every evening"
ONE = SequenceId(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    checkpoint: Checkpoint
    prompt: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """Tokens, and the float32 logits [tokens, vocab] that each was the best of."""

    tokens: list[int]
    logits: np.ndarray


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    if request.param == "gemma":
        folder = os.environ.get("POTLUCK_TEST_GEMMA")
        if not folder:
            pytest.skip("POTLUCK_TEST_GEMMA names no folder")
        path = Path(folder)
        ids = transformers.AutoTokenizer.from_pretrained(path)(CONTINUED)["input_ids"]
    else:
        path = request.getfixturevalue("smollm2_path")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
        ids = chat["input_ids"]
    checkpoint = open_checkpoint(path)
    assert any(info.affine is not None for info in checkpoint.tensors.values())
    yield Model(name=request.param, checkpoint=checkpoint, prompt=list(ids))
    checkpoint.close()


@pytest.fixture(scope="module")
def reference(model: Model) -> Greedy:
    """transformers in float32 on the dequantized weights."""
    config = transformers.AutoConfig.for_model(**model.checkpoint.config)
    library: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in library.named_parameters():
        model.checkpoint.read_into(name, parameter.data.numpy(), "float32")
    library.generation_config.eos_token_id = None
    ids = torch.tensor([model.prompt])
    with torch.inference_mode():
        found = library.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = [int(token) for token in found.sequences[0, len(model.prompt) :]]
    return Greedy(tokens=tokens, logits=torch.cat(found.logits).float().numpy())


def shards(model: Model, cuts: Sequence[int], backends: Sequence[Backend], dtype: DType) -> list[ShardBackend]:
    num_layers = model.checkpoint.spec.num_layers
    bounds = [0, *cuts, num_layers]
    return [
        load_shard(
            model.checkpoint,
            StageSpec(
                first=bounds[index],
                last=bounds[index + 1],
                num_layers=num_layers,
                device="mlx" if backend == "mlx" else "cpu",
                compute_dtype=dtype,
                wire_dtype=dtype,
                next_dtype=dtype,
                context_tokens=512,
                kv_capacity_tokens=512,
            ),
            backend=backend,
        )
        for index, backend in enumerate(backends)
    ]


def greedy(ring: Sequence[ShardBackend], prompt: Sequence[int], num_tokens: int) -> Greedy:
    """The prompt in one step, then a token a step."""
    ids = list(prompt)
    rows = []
    start = 0
    while len(ids) - len(prompt) < num_tokens:
        entries = (Entry(ONE, start, tuple(ids[start:]), 1),)
        output = None
        for shard in ring:
            output = shard.forward(Batch(entries=entries, hidden=output))
        assert output is not None
        rows.append(output[0])
        start = len(ids)
        ids.append(int(output[0].argmax()))
    for shard in ring:
        shard.kv.release(ONE)
    return Greedy(tokens=ids[len(prompt) :], logits=np.stack(rows))


def gap_at_first_difference(name: str, got: Greedy, wanted: Greedy) -> float:
    """How much better, in `wanted`'s logits, its token is than the one that was picked instead; 0 for the same text."""
    pairs = zip(got.tokens, wanted.tokens, strict=False)
    first = next((position for position, (left, right) in enumerate(pairs) if left != right), None)
    if first is None:
        print(f"{name}: the same {min(len(got.tokens), len(wanted.tokens))} tokens")
        return 0.0
    row = wanted.logits[first]
    gap = float(row[wanted.tokens[first]] - row[got.tokens[first]])
    print(f"{name}: first difference at token {first}, logit gap {gap:.5f}")
    return gap


def test_float32_gives_the_text_of_the_files_numbers(model: Model, reference: Greedy) -> None:
    (shard,) = shards(model, [], ["torch"], "float32")
    assert getattr(shard, "path", None) == "fused"
    got = greedy([shard], model.prompt, NUM_TOKENS)
    assert gap_at_first_difference(f"{model.name}, float32", got, reference) < NEAR_TIE


def test_bfloat16_differs_from_it_only_where_two_tokens_are_close(model: Model, reference: Greedy) -> None:
    (shard,) = shards(model, [], ["torch"], "bfloat16")
    got = greedy([shard], model.prompt, NUM_TOKENS)
    assert gap_at_first_difference(f"{model.name}, bfloat16", got, reference) < BF16_NEAR_TIE


def test_a_ring_of_torch_and_mlx_gives_it_too(model: Model, reference: Greedy) -> None:
    """Both run the file's quantized numbers; MLX has the two layers in the middle."""
    middle = model.checkpoint.spec.num_layers // 2
    ring = shards(model, [middle - 1, middle + 1], ["torch", "mlx", "torch"], "float32")
    got = greedy(ring, model.prompt, MIXED_TOKENS)
    assert gap_at_first_difference(f"{model.name}, torch and MLX", got, reference) < NEAR_TIE


def test_a_difference_is_found_and_its_gap_is_of_the_text_that_was_wanted() -> None:
    wanted = Greedy(tokens=[1, 0], logits=np.array([[0.0, 2.0], [3.0, 1.0]]))
    assert gap_at_first_difference("made up", Greedy(tokens=[1, 1], logits=wanted.logits), wanted) == 2.0
    assert gap_at_first_difference("made up", Greedy(tokens=[1], logits=wanted.logits[:1]), wanted) == 0.0
