"""How stages hold weights: what is planned is what is loaded, in the form that was asked for. And a host's threads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import httpx
import psutil
import pytest

from bench.stage.random_checkpoint import LlamaShape, write_checkpoint
from tests.support.e2e.potluck_process import ASK_S, Home, Running, up_arguments
from tests.support.needs import NEEDS_MLX
from transport.messages.ring import DTYPE_BYTES

SHAPE = LlamaShape(hidden=256, intermediate=512, layers=4, heads=4, kv_heads=2, vocab=49152, tied=True, context=512)
LAYER_PARAMS = sum(math.prod(shape) for name, shape in SHAPE.tensors().items() if ".layers.0." in name)
PLAN = ("--use-all", "--objective", "proportional")
DEVICES = ("--device", "torch:cpu", "--device", "mlx")


@pytest.fixture(scope="module")
def dense_model(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose file has it in bfloat16, with a real tokenizer."""
    folder = write_checkpoint(SHAPE, tmp_path_factory.mktemp("dense"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (smollm2_path / name).is_file():
            shutil.copyfile(smollm2_path / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this host's devices are measured once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def own_home(home: Home, own_data: Path) -> Home:
    """A store of their own."""
    return Home(data=own_data, runtime=home.runtime)


@pytest.mark.parametrize(("option", "form"), [("stored", "stored"), ("8", "8-bit"), ("4", "4-bit")])
def test_what_is_planned_is_loaded_and_answers(own_home: Home, dense_model: Path, option: str, form: str) -> None:
    pytest.importorskip("mlx.core", reason=NEEDS_MLX)
    planned = own_home.run(
        "plan", str(dense_model), *DEVICES, *PLAN, "--estimate", "--quantize", option, "--context", "256", "--json"
    )
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["weights"] == form
    options = (*DEVICES, *PLAN, "--estimate", "--quantize", option, "--context", "256", "--threads", "1")
    running = Running(own_home, "up", str(dense_model), *options, "--port", "0", "--json")
    facts = running.facts()
    assert facts["plan"]["weights"] == form
    assert len(facts["stages"]) == 2
    for stage, promised in zip(facts["stages"], plan["stages"], strict=True):
        dense_bits = 8 * DTYPE_BYTES[stage["dtype"]]
        group_bits = 32 if stage["backend"] == "torch" else 2 * dense_bits  # for 64 weights
        bits = dense_bits if option == "stored" else int(option) + group_bits / 64
        params = SHAPE.vocab * SHAPE.hidden + (stage["last"] - stage["first"]) * LAYER_PARAMS  # A tied head is on both.
        assert stage["weights_bytes"] == pytest.approx(params * bits / 8, rel=0.01)
        assert (stage["first"], stage["last"]) == (promised["first"], promised["last"])
        assert stage["weights_bytes"] == pytest.approx(promised["weights_bytes"], rel=0.001)
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": facts["model"], "messages": messages, "max_tokens": 4, "temperature": 0}
    reply = httpx.post(f"{facts['url']}/v1/chat/completions", json=body, timeout=ASK_S, trust_env=False)
    assert reply.status_code == 200, reply.text
    assert form in own_home.run("status").stdout
    running.stop()
    assert own_home.leftovers() == []


def test_auto_takes_what_fits_and_says_so(own_home: Home, dense_model: Path) -> None:
    """27 MiB as stored and 14 in 8 bits, on a device that has room for 20 beside its runtime."""
    one = ("--device", "torch:cpu", "--context", "256", "--concurrency", "1", "--memory", "404MiB")
    refused = own_home.run("plan", str(dense_model), *one, "--estimate")
    assert refused.returncode == 1
    assert "--quantize 8 would fit, with 0.39 GiB" in refused.stderr
    found = own_home.run("plan", str(dense_model), *one, "--estimate", "--quantize", "auto", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["weights"] == "8-bit"
    assert "8-bit: as stored it does not fit" in " ".join(found.stderr.split())


@pytest.mark.parametrize(("devices", "wanted"), [(1, "2"), (2, "1")])
def test_the_threads_of_a_host_are_shared_out(home: Home, devices: int, wanted: str) -> None:
    if len(psutil.Process().cpu_affinity() or []) < 2:
        pytest.skip("this host has one CPU")
    running = Running(home, *up_arguments("--threads", "2", devices=("--device", "torch:cpu") * devices))
    running.facts()
    workers = [process for process in home.processes() if "shard.worker" in process.cmdline()]
    assert len(workers) == devices
    assert {worker.environ()["OMP_NUM_THREADS"] for worker in workers} == {wanted}
    running.stop()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--threads", "0"), "--threads 0: expected a whole number of at least 1"),
        (("--threads", "100000"), "100000 threads were asked for; this host has"),
        (("--quantize", "5"), "--quantize 5: expected one of stored"),
    ],
)
@pytest.mark.parametrize("command", [("up", "smollm2"), ("run", "smollm2", "Hi"), ("plan", "smollm2"), ("demo",)])
def test_bad_values_are_refused_by_name(
    home: Home,
    command: tuple[str, ...],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    # A head of the developer's own may have the usual port.
    port = ("--port", "0") if command[0] in ("up", "demo") else ()
    done = home.run_here(*command, *port, *arguments)
    assert done.returncode == 1
    assert says in " ".join(done.stderr.split()) and "hint:" in done.stderr
    assert home.leftovers() == []
