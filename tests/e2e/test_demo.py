"""The demo, as `make demo ARGS="--once --json"` runs it."""

from __future__ import annotations

import json

from tests.support.e2e.potluck_process import Home


def test_the_demo_answers_and_leaves_nothing(home: Home) -> None:
    done = home.run("demo", "--once", "--json", "--port", "0")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["model"] == "smollm2"
    assert "potluck" in facts["answer"].lower() or "meal" in facts["answer"].lower()
    assert facts["tokens"] > 10
    assert facts["tokens_per_s"] > 0
    assert facts["ttft_s"] > 0
    assert [stage["backend"] for stage in facts["stages"]] == ["torch", "mlx", "torch"]
    assert facts["stages"][0]["first"] == 0
    assert facts["stages"][2]["last"] == 30
    for stage in facts["stages"]:
        assert stage["weights_bytes"] > 0
        assert stage["kv_bytes"] >= 0
        assert stage["ms_per_token"] > 0
    assert home.leftovers() == []


def test_run_answers_without_a_head(home: Home) -> None:
    done = home.run("run", "smollm2", "Say hello.", "--max-tokens", "8", "--temperature", "0", "--device", "torch:cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert home.leftovers() == []
