"""Any split of any tiny random model, on any mix of runners, gives the logits of the unsplit library model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from shard.formats.families import why_not_fused
from tests.support.shard.stage_runner import (
    Prompts,
    Runner,
    load_stages,
    logits_by_position,
    random_prompts,
    random_steps,
    relative_error,
)
from tests.support.shard.tiny import (
    CORE_FAMILIES,
    FAMILIES,
    NUM_LAYERS,
    MemoryCheckpoint,
    memory_checkpoint,
    reference_logits,
    router_gap,
    tiny_config,
    tiny_model,
)
from transport.messages.ring import SequenceId

TOLERANCE = 1e-4
NEAR_TIE = 1e-5
SEEDS = 3
# Longer than three windows, so that sliding layers slide; different, so that steps are ragged.
LENGTHS = (37, 21, 9)

SPLITS = [cuts for count in range(NUM_LAYERS) for cuts in combinations(range(1, NUM_LAYERS), count)]
MIXES: list[tuple[Runner, ...]] = [("library",), ("fused",), ("fused", "library")]
if importlib.util.find_spec("mlx") and importlib.util.find_spec("mlx_lm"):
    MIXES += [("mlx",), ("fused", "mlx"), ("mlx", "library")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model whose routers have no near-tie on these ids, and what it says about them unsplit."""

    seed: int
    checkpoint: MemoryCheckpoint
    prompts: Prompts
    reference: dict[SequenceId, np.ndarray]


@cache
def cases(family: str) -> tuple[tuple[Case, ...], int]:
    """The first SEEDS cases without a near-tie, and how many seeds that rule excluded."""
    found: list[Case] = []
    excluded = 0
    seed = 0
    while len(found) < SEEDS:
        model = tiny_model(family, seed)
        prompts = random_prompts(seed, LENGTHS)
        if min(router_gap(model, ids) for ids in prompts.values()) < NEAR_TIE:
            excluded += 1
        else:
            reference = {sequence: reference_logits(model, ids) for sequence, ids in prompts.items()}
            with TemporaryDirectory() as folder:
                checkpoint = memory_checkpoint(model, Path(folder))
            found.append(Case(seed=seed, checkpoint=checkpoint, prompts=prompts, reference=reference))
        seed += 1
    return tuple(found), excluded


def families_for(mix: tuple[Runner, ...]) -> list[str]:
    """Each torch path with every family that it runs; a mix of runners with those that all of them run."""
    families = CORE_FAMILIES if "mlx" in mix else tuple(FAMILIES)
    return [family for family in families if "fused" not in mix or why_not_fused(tiny_config(family).to_dict()) is None]


@pytest.mark.parametrize(
    ("family", "mix"),
    [pytest.param(family, mix, id=f"{family}-{'+'.join(mix)}") for mix in MIXES for family in families_for(mix)],
)
def test_any_split_gives_the_unsplit_logits(family: str, mix: tuple[Runner, ...]) -> None:
    proven, _ = cases(family)
    for case in proven:
        for cuts in SPLITS:
            if len(mix) > len(cuts) + 1:
                continue  # Too few stages for this mix: it is tested as a mix of one.
            stages = load_stages(case.checkpoint, cuts, mix)
            rows = logits_by_position(stages, random_steps(case.seed, case.prompts))
            for sequence, reference in case.reference.items():
                positions = [position for held, position in rows if held == sequence]
                got = np.stack([rows[sequence, position] for position in positions])
                error = relative_error(got, reference[positions])
                assert error <= TOLERANCE, f"seed {case.seed}, cut at {cuts}, sequence {sequence}: {error:.1e}"


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_few_seeds_are_excluded_for_near_ties(family: str) -> None:
    _, excluded = cases(family)
    print(f"{family}: {excluded} seeds excluded, {SEEDS} used")
    assert excluded <= 2


def test_parity_would_notice_a_wrong_layer() -> None:
    """The measure itself: exchanging two layers' weights is far outside the tolerance."""
    case = cases("llama")[0][0]
    arrays = dict(case.checkpoint.arrays)
    one, two = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    arrays[one], arrays[two] = arrays[two], arrays[one]
    wrong = MemoryCheckpoint(spec=case.checkpoint.spec, config=case.checkpoint.config, arrays=arrays)
    rows = logits_by_position(load_stages(wrong, (2,)), random_steps(0, case.prompts))
    got = np.stack(list(rows.values()))
    wanted = np.stack([case.reference[sequence][position] for sequence, position in rows])
    assert relative_error(got, wanted) > 100 * TOLERANCE
