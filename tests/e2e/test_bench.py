"""`potluck bench` measures a running head and one that it starts, and says what it can't."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.e2e.potluck_process import Home, Running

GRID = ("--prompt", "24", "--output", "8", "--concurrency", "1", "2", "--rounds", "1")


def test_the_running_head(demo: Running) -> None:
    done = demo.home.run("bench", *GRID)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["model"], result["cores"] > 0, bool(result["commit"])) == ("smollm2", True, True)
    one, two = result["rows"]
    assert (one["concurrency"], two["concurrency"]) == (1, 2)
    for row in result["rows"]:
        assert abs(row["prompt_tokens"] - 24) < 16  # the chat template's own are some
        assert row["tokens_per_s"] > 0
        assert 0 < row["ttft_s"] < 600
        assert 0 < row["gap_p50_s"] <= row["gap_p95_s"] <= row["gap_p99_s"]
        # Two short chats on a busy machine need not decode at the same time.
        assert row["decode_tokens_per_s"] > 0 or row is two
        assert row["bound_tokens_per_s"] > 0
        assert len(row["stages"]) == 3
        assert all(0 < stage["compute"] < 1 for stage in row["stages"])
    assert all(stage["wire"] is not None for stage in one["stages"])


def test_a_head_of_its_own_and_its_devices_alone(home: Home, tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md"))
    devices = ("--device", "torch:cpu", "--device", "mlx", "--threads", "1", "--use-all", "--estimate")
    done = home.run("bench", "smollm2", *GRID, "--singles", *files, "--", *devices, timeout_s=500)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["ring"] for row in result["rows"][:2]] == ["ring", "ring"]
    assert sorted(row["ring"] for row in result["rows"][2:]) == ["cpu", "cpu", "mlx", "mlx"]
    assert [len(row["stages"]) for row in result["rows"]] == [2, 2, 1, 1, 1, 1]
    table = (tmp_path / "out.md").read_text()
    assert done.stdout == table
    assert result["commit"] in table
    assert home.leftovers() == []


def test_load_on_the_running_head(demo: Running, tmp_path: Path) -> None:
    load = ("--clients", "2", "--rate", "4", "--requests", "4", "--warm-up", "0", "--prompt", "48", "--output", "6")
    done = demo.home.run("bench", "--serve", *load, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["load"] for row in result["rows"]] == ["2 clients", "4/s"]
    for row in result["rows"]:
        assert (row["done"], row["failed"], row["prompt_tokens"], row["output_tokens"]) == (4, 0, 48, 6)
        assert 0 < row["ttft_s"]["p50"] <= row["latency_s"]["p50"] <= row["latency_s"]["p99"]
        assert row["tokens_per_s"] > 0
        assert [stage["first"] for stage in row["stages"]] == sorted(stage["first"] for stage in row["stages"])
        assert len(row["stages"]) == 3
        assert all(0 <= stage["idle"] <= 1 for stage in row["stages"])
    assert "2 clients" in done.stdout and "first token s" in done.stdout
    # The same by its address, as a peer is measured.
    one = ("--clients", "1", "--requests", "1", *load[6:])
    peer = demo.home.run("bench", "--serve", *one, "--url", demo.facts()["url"], "--json")
    assert peer.returncode == 0, peer.stderr
    assert json.loads(peer.stdout)["rows"][0]["output_tokens"] == 6


def test_nothing_to_measure(home: Home) -> None:
    done = home.run("bench")
    assert done.returncode == 1
    assert "no head runs" in done.stderr
    assert "hint" in done.stderr
    assert home.run("bench", "--singles").returncode == 2
    started = home.run("bench", "smollm2", *GRID, "--", "--device", "abacus")
    assert started.returncode == 1
    assert "abacus" in started.stderr
    assert "Traceback" not in started.stderr
    load = home.run("bench", "--serve")
    assert (load.returncode, load.stdout) == (1, "")
    assert "no head runs" in load.stderr
    load = home.run("bench", "--serve", "smollm2", "--", "--device", "abacus")
    assert load.returncode == 1
    assert "abacus" in load.stderr and "Traceback" not in load.stderr
    assert home.leftovers() == []
