"""The rules of forks in a step: who may give KV to whom, and what is left where one is refused."""

from __future__ import annotations

import pytest

from shard.stage import StageInput, TokenOutput
from shard.worker.load import load_shard
from shard.worker.local_stage import LocalStage
from tests.support.shard.stage_runner import tiny_spec
from tests.support.shard.tiny import MemoryCheckpoint, memory_checkpoint, tiny_model
from transport.errors import BadMessage, DoesNotFit, PotluckError, StageFailed
from transport.messages.ring import Entry, EntryResult, Fork, Op, Open, Release, Sampling, SequenceId, Truncate

ONE, TWO, THREE = SequenceId(1), SequenceId(2), SequenceId(3)
GREEDY = Sampling(temperature=0)
FAVOURITE = 50
ONCE = Sampling(temperature=0, frequency_penalty=1000, logit_bias={FAVOURITE: 500})
"""Samples the favourite, but never what has been generated before."""
PROMPT = (5, 17, 33, 8, 99, 41)
LONG = 4 * tuple(range(3, 103))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MemoryCheckpoint]:
    families = ("llama", "mistral")
    made = {name: memory_checkpoint(tiny_model(name, 3), tmp_path_factory.mktemp(name)) for name in families}
    return {
        name: MemoryCheckpoint(spec=one.spec, config={**one.config, "max_position_embeddings": 1024}, arrays=one.arrays)
        for name, one in made.items()
    }


@pytest.fixture
def stage(checkpoints: dict[str, MemoryCheckpoint]) -> LocalStage:
    spec = tiny_spec(0, 4, context_tokens=32, kv_capacity_tokens=40)
    return LocalStage(load_shard(checkpoints["llama"], spec, backend="torch"))


@pytest.fixture
def windowed(checkpoints: dict[str, MemoryCheckpoint]) -> LocalStage:
    """Holds ONE, too long to go back to its beginning."""
    stage = LocalStage(load_shard(checkpoints["mistral"], tiny_spec(0, 4, context_tokens=1024), backend="torch"))
    results(stage, (Open(ONE, LONG, GREEDY),), Entry(ONE, 0, LONG, 0))
    return stage


def results(stage: LocalStage, ops: tuple[Op, ...], *entries: Entry) -> tuple[EntryResult, ...]:
    output = stage.forward(StageInput(ops=ops, entries=entries, hidden=None))
    assert isinstance(output, TokenOutput)
    return output.results


def hold(stage: LocalStage, sequence: SequenceId, ids: tuple[int, ...] = PROMPT) -> None:
    results(stage, (Open(sequence, ids, GREEDY),), Entry(sequence, 0, ids, 0))


def lengths(stage: LocalStage) -> tuple[int, int, int]:
    return tuple(stage._backend.kv.length(sequence) for sequence in (ONE, TWO, THREE))  # type: ignore[return-value]


@pytest.mark.parametrize("moves", [False, True])
def test_a_forked_sequence_goes_on_in_the_same_step(stage: LocalStage, moves: bool) -> None:
    (wanted,) = results(stage, (Open(THREE, (*PROMPT, 7), GREEDY),), Entry(THREE, 0, (*PROMPT, 7), 1))
    hold(stage, ONE)
    fork = Fork(TWO, ONE, 4, moves)
    (got,) = results(stage, (Open(TWO, (*PROMPT, 7), GREEDY), fork), Entry(TWO, 4, (*PROMPT[4:], 7), 1))
    assert (got.position, got.tokens[0].token_id) == (7, wanted.tokens[0].token_id)
    assert lengths(stage) == (0 if moves else 6, 7, 7)
    if moves:
        with pytest.raises(StageFailed, match="sequence 1 is not open"):
            results(stage, (), Entry(ONE, 0, PROMPT, 1))


@pytest.mark.parametrize("moves", [False, True])
def test_a_fork_knows_the_ids_that_only_its_source_was_given(stage: LocalStage, moves: bool) -> None:
    """Penalties count all ids, also where KV waits under a name that was opened without any."""
    ids = (*PROMPT, FAVOURITE, 9, 7)
    seven, eight = SequenceId(7), SequenceId(8)
    (plain,) = results(stage, (Open(seven, ids, ONCE),), Entry(seven, 0, ids, 1))
    (wanted,) = results(stage, (Open(eight, PROMPT, ONCE),), Entry(eight, 0, ids, 1))
    assert plain.tokens[0].token_id == FAVOURITE != wanted.tokens[0].token_id
    results(stage, (Truncate(seven, 0), Truncate(eight, 0), Open(ONE, PROMPT, ONCE)), Entry(ONE, 0, ids[:-1], 1))
    results(stage, (Open(TWO, (), GREEDY), Fork(TWO, ONE, 8)))
    opened = Open(THREE, PROMPT, ONCE)
    (again,) = results(stage, (opened, Fork(THREE, TWO, 8, moves)), Entry(THREE, 8, ids[-1:], 1))
    assert again.tokens[0].token_id == wanted.tokens[0].token_id


@pytest.mark.parametrize(
    ("fork", "error", "match"),
    [
        (Fork(THREE, ONE, 3), StageFailed, "sequence 3 is not open"),
        (Fork(TWO, THREE, 3), StageFailed, "sequence 3 is not open"),
        (Fork(TWO, ONE, 7), StageFailed, "holds 6 tokens.*7 were to be given"),
        (Fork(TWO, ONE, 0), BadMessage, "0 positions"),
        (Fork(TWO, ONE, -2), BadMessage, "-2 positions"),
        (Fork(TWO, TWO, 1), BadMessage, "sequence 2 can't be given to sequence 2"),
        (Fork(ONE, TWO, 1), BadMessage, "which holds 6"),
    ],
)
@pytest.mark.parametrize("moves", [False, True])
def test_bad_forks_are_refused_and_the_ops_after_them_applied(
    stage: LocalStage, fork: Fork, error: type[PotluckError], match: str, moves: bool
) -> None:
    hold(stage, ONE)
    fork = Fork(fork.sequence, fork.source, fork.length, moves)
    with pytest.raises(error, match=match) as refusal:
        results(stage, (Open(TWO, PROMPT, GREEDY), fork, Release(SequenceId(9)), Open(SequenceId(9), PROMPT, GREEDY)))
    assert error is BadMessage or "replayed" in refusal.value.hint
    results(stage, (), Entry(SequenceId(9), 0, PROMPT, 1))
    gone = moves and fork.source == ONE
    assert lengths(stage) == (0 if gone else 6, 0, 0)


def test_a_fork_onto_other_ids_is_refused(stage: LocalStage) -> None:
    hold(stage, ONE)
    with pytest.raises(BadMessage, match="other ids in their first 5"):
        results(stage, (Open(TWO, (*PROMPT[:4], 8, 8), GREEDY), Fork(TWO, ONE, 5)))
    assert lengths(stage) == (6, 0, 0)
    results(stage, (Fork(TWO, ONE, 4),))
    assert lengths(stage) == (6, 4, 0)


def test_forked_tokens_count_and_moved_ones_don_t(stage: LocalStage) -> None:
    ids = tuple(range(5, 29))
    hold(stage, ONE, ids)
    results(stage, (Open(TWO, ids, GREEDY), Fork(TWO, ONE, 16)))
    with pytest.raises(DoesNotFit, match=r"41 tokens of KV.*40"):
        results(stage, (Open(THREE, ids, GREEDY), Fork(THREE, ONE, 1)))
    assert lengths(stage) == (24, 16, 0)
    results(stage, (Fork(THREE, ONE, 20, moves=True),))
    assert lengths(stage) == (0, 16, 20)
    results(stage, (Open(ONE, ids, GREEDY), Fork(ONE, THREE, 4)))
    with pytest.raises(DoesNotFit):
        results(stage, (), Entry(ONE, 4, ids[4:5], 1))
    # What an op before it gives back makes room.
    results(stage, (Truncate(THREE, 4), Release(ONE), Open(ONE, ids, GREEDY), Fork(ONE, TWO, 16)))
    assert lengths(stage) == (16, 16, 4)


@pytest.mark.parametrize("moves", [False, True])
def test_a_window_that_has_moved_on_refuses(windowed: LocalStage, moves: bool) -> None:
    with pytest.raises(StageFailed, match="position 20: its sliding window has moved on") as refusal:
        results(windowed, (Open(TWO, LONG, GREEDY), Fork(TWO, ONE, 20, moves)))
    assert "replayed" in refusal.value.hint
    assert lengths(windowed) == (0 if moves else len(LONG), 0, 0)
    if moves:
        assert (windowed._backend.kv.num_sequences(), windowed._backend.kv.num_bytes()) == (0, 0)


@pytest.mark.parametrize("moves", [False, True])
def test_a_window_goes_back_a_little(windowed: LocalStage, moves: bool) -> None:
    length = len(LONG) - 50
    (wanted,) = results(windowed, (Open(THREE, LONG, GREEDY),), Entry(THREE, 0, LONG, 1))
    (got,) = results(
        windowed, (Open(TWO, LONG, GREEDY), Fork(TWO, ONE, length, moves)), Entry(TWO, length, LONG[length:], 1)
    )
    assert got.tokens[0].token_id == wanted.tokens[0].token_id
