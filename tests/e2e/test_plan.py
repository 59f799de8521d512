"""`potluck plan` from a file of a pool: nothing is loaded, measured or looked up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.measurements import estimated_pool
from potluck.cli.plan_inputs import save_pool
from tests.support.e2e.potluck_process import Done, run_here
from tests.support.planner.pool import device, model


@pytest.fixture
def pool_file(tmp_path: Path) -> Path:
    pool = estimated_pool(model(), [device("mac", gb_per_s=40, usable_mib=500), device("pc", host="there")], "here")
    save_pool(tmp_path / "pool.json", model(head_dim=64), pool)
    return tmp_path / "pool.json"


def potluck_plan(pool_file: Path, *arguments: str) -> Done:
    return run_here("plan", "--pool", str(pool_file), *arguments)


def facts(pool_file: Path, *arguments: str) -> Any:
    found = potluck_plan(pool_file, "--json", *arguments)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_says_what_a_ring_would_do(pool_file: Path) -> None:
    found = potluck_plan(pool_file, "--objective", "latency")
    assert found.returncode == 0, found.stderr
    for word in ("mac", "pc", "hop ms", "Predicted: one chat", "What limits it: the memory of mac", "With another mac"):
        assert word in found.stdout


def test_devices_that_are_not_there(pool_file: Path) -> None:
    with_one = facts(pool_file, "--with", "gamer,mem=24GiB,bw=1000GB/s,tflops=80,link=1GB/s,latency=0.5ms")
    assert [stage["device"] for stage in with_one["stages"]] == ["gamer"]
    assert {item["name"] for item in with_one["left_out"]} == {"mac", "pc"}
    without = facts(pool_file, "--without", "mac")
    assert [stage["device"] for stage in without["stages"]] == ["pc"]


def test_layers_by_hand_and_rules(pool_file: Path) -> None:
    by_hand = facts(pool_file, "--layers", "pc=6,mac=2")
    assert [(stage["device"], stage["num_layers"]) for stage in by_hand["stages"]] == [("pc", 6), ("mac", 2)]
    assert facts(pool_file, "--objective", "even")["strategy"] == "even"
    assert len(facts(pool_file, "--use-all")["stages"]) == 2


def test_weights_in_another_form_are_estimated_and_told(pool_file: Path) -> None:
    found = potluck_plan(pool_file, "--quantize", "dense")
    assert found.returncode == 0, found.stderr
    assert "Weights dense." in found.stdout
    assert "(dense weights) are estimates" in " ".join(found.stderr.split())
    assert facts(pool_file, "--quantize", "dense")["id"] != facts(pool_file)["id"]
    assert facts(pool_file)["weights"] == "stored"


def test_kv_in_8_bits_is_planned_and_told(pool_file: Path) -> None:
    found = potluck_plan(pool_file, "--kv-cache", "8-bit")
    assert found.returncode == 0, found.stderr
    assert "8-bit KV for 16384 tokens" in found.stdout
    full, half = facts(pool_file), facts(pool_file, "--kv-cache", "8-bit")
    assert (full["kv"], half["kv"]) == ("full", "8-bit")
    assert full["id"] != half["id"]
    assert sum(stage["kv_bytes"] for stage in half["stages"]) < 0.6 * sum(stage["kv_bytes"] for stage in full["stages"])


def test_a_file_that_was_saved_with_a_form_keeps_it(pool_file: Path) -> None:
    again = pool_file.parent / "again.json"
    assert potluck_plan(pool_file, "--quantize", "4", "--save-pool", str(again)).returncode == 0
    found = potluck_plan(again, "--json")
    assert json.loads(found.stdout)["weights"] == "4-bit"
    assert "estimates" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--quantize", "6"), "--quantize 6: expected one of stored"),
        (("--kv-cache", "4-bit"), "--kv-cache 4-bit: expected one of full"),
        (("--layers", "pc=6,mac=3"), "places 9 layers"),
        (("--layers", "nobody=8"), "not in the pool"),
        (("--without", "nobody"), "not in the pool"),
        (("--with", "x,mem=1GiB"), "lacks a name, mem or bw"),
        (("--with", "mac,mem=1GiB,bw=1GB/s"), "has one of that name"),
        (("--with", "x,mem=1GiB,bw=1GB"), "is not a rate"),
        (("--with", "x,mem=1GiB,bw=1GB/s,latency=fast"), "is not a time"),
        (("--objective", "best"), "--objective best: expected one of auto"),
        (("--context", "99999"), "has a context of 8,192"),
        (("--prompt", "4000", "--output", "4000"), "do not go into a context"),
    ],
)
def test_what_can_not_be_is_one_line_and_a_hint(pool_file: Path, arguments: tuple[str, ...], says: str) -> None:
    found = potluck_plan(pool_file, *arguments)
    assert found.returncode != 0
    assert says in found.stderr and "hint:" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_corrupt_file(pool_file: Path) -> None:
    pool_file.write_text(pool_file.read_text()[:200])
    found = potluck_plan(pool_file)
    assert found.returncode != 0
    assert "can't be read" in found.stderr
