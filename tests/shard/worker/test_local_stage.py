"""The rules of a step: ops, refusals before anything changes, and results by absolute position."""

from __future__ import annotations

import numpy as np
import pytest

from shard.stage import HiddenOutput, StageInput, TokenOutput
from shard.worker.load import load_shard
from shard.worker.local_stage import LocalStage
from tests.support.shard.stage_runner import tiny_spec
from tests.support.shard.tiny import MemoryCheckpoint, memory_checkpoint, reference_logits, tiny_model
from transport.errors import BadMessage, DoesNotFit, PotluckError, StageFailed
from transport.messages.ring import Entry, EntryResult, Op, Open, Release, Sampling, SequenceId, Truncate

ONE, TWO = SequenceId(1), SequenceId(2)
GREEDY = Sampling(temperature=0)
PROMPT = (5, 17, 33, 8, 99, 41)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MemoryCheckpoint:
    return memory_checkpoint(tiny_model("llama", 3), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def stage(checkpoint: MemoryCheckpoint) -> LocalStage:
    return LocalStage(
        load_shard(checkpoint, tiny_spec(0, 4, context_tokens=32, kv_capacity_tokens=40), backend="torch")
    )


def step(ops: tuple[Op, ...] = (), *entries: Entry, hidden: np.ndarray | None = None) -> StageInput:
    return StageInput(ops=ops, entries=entries, hidden=hidden)


def results(stage: LocalStage, work: StageInput) -> tuple[EntryResult, ...]:
    output = stage.forward(work)
    assert isinstance(output, TokenOutput)
    return output.results


def generate(
    stage: LocalStage, sequence: SequenceId, prompt: tuple[int, ...], sampling: Sampling, count: int
) -> list[int]:
    opened = Open(sequence, prompt, sampling)
    (result,) = results(stage, step((opened,), Entry(sequence, 0, prompt, 1)))
    assert result.position == len(prompt)
    ids = [result.tokens[0].token_id]
    while len(ids) < count:
        (result,) = results(stage, step((), Entry(sequence, result.position, (ids[-1],), 1)))
        ids.append(result.tokens[0].token_id)
    return ids


def test_greedy_tokens_are_those_of_the_unsplit_model(stage: LocalStage) -> None:
    ids = generate(stage, ONE, PROMPT, GREEDY, 8)
    logits = reference_logits(tiny_model("llama", 3), [*PROMPT, *ids])
    assert ids == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_results_are_named_by_the_position_they_are_for(stage: LocalStage) -> None:
    opened = Open(ONE, PROMPT, GREEDY)
    assert results(stage, step((opened,), Entry(ONE, 0, PROMPT[:4], 0))) == ()
    (result,) = results(stage, step((), Entry(ONE, 4, (*PROMPT[4:], 7, 9), 3)))
    assert result.position == 6
    assert len(result.tokens) == 3


def test_a_start_below_the_length_goes_back_and_samples_the_same_again(stage: LocalStage) -> None:
    """Penalties count ids by position: a rejected draft leaves no trace."""
    sampling = Sampling(temperature=0.9, seed=11, frequency_penalty=1.5, repetition_penalty=1.2)
    wanted = generate(stage, ONE, PROMPT, sampling, 8)
    (first,) = results(stage, step((Open(TWO, PROMPT, sampling),), Entry(TWO, 0, PROMPT, 1)))
    assert first.tokens[0].token_id == wanted[0]
    results(stage, step((), Entry(TWO, 6, (wanted[0], 3, 3, 3), 4)))
    (again,) = results(stage, step((), Entry(TWO, 6, tuple(wanted[:7]), 7)))
    assert [token.token_id for token in again.tokens] == wanted[1:]


def test_replay_of_prompt_and_generated_ids_goes_on_as_before(stage: LocalStage) -> None:
    sampling = Sampling(temperature=0.8, seed=-5, presence_penalty=1.0)
    wanted = generate(stage, ONE, PROMPT, sampling, 9)
    replayed = (*PROMPT, *wanted[:5])
    (result,) = results(stage, step((Release(ONE), Open(TWO, PROMPT, sampling)), Entry(TWO, 0, replayed, 1)))
    assert (result.position, result.tokens[0].token_id) == (11, wanted[5])


@pytest.mark.parametrize(
    ("entries", "error", "match"),
    [
        ((Entry(TWO, 0, (5,), 1),), StageFailed, "sequence 2 is not open"),
        ((Entry(ONE, 7, (5,), 1),), StageFailed, "holds 6 tokens.*starts at 7"),
        ((Entry(ONE, 6, (5,), 1), Entry(ONE, 7, (5,), 1)), BadMessage, "twice"),
        ((Entry(ONE, 6, (5,) * 27, 1),), BadMessage, "reach 33 tokens.*32"),
        ((Entry(ONE, 6, (), 0),), BadMessage, "not an entry"),
        ((Entry(ONE, 6, (5,), 2),), BadMessage, "not an entry"),
        ((Entry(ONE, -1, (5,), 1),), BadMessage, "not an entry"),
    ],
)
def test_bad_entries_are_refused_and_change_nothing(
    stage: LocalStage, entries: tuple[Entry, ...], error: type[PotluckError], match: str
) -> None:
    (before,) = results(stage, step((Open(ONE, PROMPT, GREEDY),), Entry(ONE, 0, PROMPT, 1)))
    with pytest.raises(error, match=match):
        stage.forward(step((), *entries))
    assert stage._backend.kv.num_tokens() == 6
    (after,) = results(stage, step((), Entry(ONE, 5, PROMPT[5:], 1)))
    assert after == before


def test_kv_capacity_is_shared_and_checked_before_anything_runs(stage: LocalStage) -> None:
    stage.forward(step((Open(ONE, (5,) * 30, GREEDY), Open(TWO, PROMPT, GREEDY)), Entry(ONE, 0, (5,) * 30, 0)))
    with pytest.raises(DoesNotFit, match=r"43 tokens of KV.*40"):
        stage.forward(step((), Entry(ONE, 30, (5, 5), 1), Entry(TWO, 0, (5,) * 11, 1)))
    assert stage._backend.kv.num_tokens() == 30
    # Going back makes room within the same step.
    stage.forward(step((), Entry(ONE, 20, (5, 5), 1), Entry(TWO, 0, (5,) * 11, 1)))
    assert stage._backend.kv.num_tokens() == 33


def test_ops_of_a_refused_step_are_applied_all_the_same(stage: LocalStage) -> None:
    """A failed step goes on through the ring with its ops: every stage must apply them, or they would disagree."""
    stage.forward(step((Open(ONE, PROMPT, GREEDY),), Entry(ONE, 0, PROMPT, 1)))
    with pytest.raises(BadMessage, match="open already"):
        stage.forward(step((Open(ONE, PROMPT, GREEDY), Release(ONE), Open(TWO, PROMPT, GREEDY))))
    assert stage._backend.kv.num_sequences() == 0
    stage.forward(step((), Entry(TWO, 0, PROMPT, 1)))
    with pytest.raises(StageFailed, match="not open"):
        stage.forward(step((Truncate(ONE, 2), Truncate(TWO, 2))))
    assert stage._backend.kv.length(TWO) == 2


def test_release_frees_all_memory_and_is_repeatable(stage: LocalStage) -> None:
    generate(stage, ONE, PROMPT, GREEDY, 3)
    assert stage._backend.kv.num_bytes() > 0
    stage.forward(step((Release(ONE), Release(ONE), Release(TWO))))
    assert (stage._backend.kv.num_sequences(), stage._backend.kv.num_tokens(), stage._backend.kv.num_bytes()) == (
        0,
        0,
        0,
    )


def test_middle_stages_check_their_hidden_states(checkpoint: MemoryCheckpoint) -> None:
    middle = LocalStage(load_shard(checkpoint, tiny_spec(1, 3), backend="torch"))
    hidden = np.zeros((2, 64), dtype=np.float32)
    middle.forward(step((Open(ONE, PROMPT, GREEDY),)))
    output = middle.forward(step((), Entry(ONE, 0, PROMPT[:2], 0), hidden=hidden))
    assert isinstance(output, HiddenOutput)
    assert output.hidden.shape == (2, 64)
    for wrong in (None, hidden[:1], hidden.astype(np.float16)):
        with pytest.raises(BadMessage, match="needs hidden states"):
            middle.forward(step((), Entry(ONE, 2, PROMPT[2:4], 0), hidden=wrong))


def test_a_step_of_ops_only_gives_no_rows(checkpoint: MemoryCheckpoint, stage: LocalStage) -> None:
    assert results(stage, step((Open(ONE, PROMPT, GREEDY),))) == ()
    first = LocalStage(load_shard(checkpoint, tiny_spec(0, 2, next_dtype="bfloat16"), backend="torch"))
    output = first.forward(step((Open(ONE, PROMPT, GREEDY),)))
    assert isinstance(output, HiddenOutput)
    assert (output.hidden.shape, output.hidden.dtype) == ((0, 64), np.uint16)
