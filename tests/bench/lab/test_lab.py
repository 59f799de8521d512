"""A lab's hosts reach each other as fast, as soon and as far as it says, and nothing of them stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.lab import Lab, parse_spec, why_not
from bench.lab.lab import STATE_DIR, remove_leftovers

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SPEC = {
    "hosts": [
        {"name": "a"},
        {"name": "b", "cpu": 0.25, "memory": "300MB"},
        {"name": "c", "rate": "40mbit"},
    ],
    "links": [
        {"between": ["a", "b"], "delay_ms": 20},
        {"from": "a", "to": "c", "rate": "20mbit"},
    ],
}
# Sends what it is told to whoever connects, or says how long a round trip and a transfer take.
ECHO = """
import socket, sys
listener = socket.create_server(("0.0.0.0", 7000))
print("up", flush=True)
while True:
    connection, _ = listener.accept()
    while data := connection.recv(65536):
        if data[-1:] == b"!":
            connection.sendall(b"!")
"""
MEASURE = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7000), 10) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        connection.sendall(b"!")
        connection.recv(1)
        times.append(time.perf_counter() - started)
    size = int(sys.argv[2])
    started = time.perf_counter()
    connection.sendall(bytes(size) + b"!")
    connection.recv(1)
    print(min(times), size * 8 / (time.perf_counter() - started))
"""
BURN = """
import time
started, used = time.perf_counter(), time.process_time()
while time.perf_counter() - started < 1.5:
    pass
print((time.process_time() - used) / (time.perf_counter() - started))
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(parse_spec(SPEC), store=tmp_path_factory.mktemp("store")) as lab:
        for host in ("b", "c"):
            echo = lab.popen(host, [sys.executable, "-c", ECHO], limited=False, stdout=subprocess.PIPE, text=True)
            assert echo.stdout is not None
            assert echo.stdout.readline() == "up\n"
        yield lab


def measure(lab: Lab, source: str, target: str, num_bytes: int = 1) -> tuple[float, float]:
    """Seconds of a round trip, and bits per second."""
    script = [sys.executable, "-c", MEASURE, lab.address(target), str(num_bytes)]
    done = lab.run(source, script, limited=False, timeout_s=240)
    assert done.returncode == 0, done.stderr
    round_trip_s, bits_per_s = map(float, done.stdout.split())
    return round_trip_s, bits_per_s


def test_a_delay_counts_in_both_directions_and_nowhere_else(lab: Lab) -> None:
    assert 0.040 <= measure(lab, "a", "b")[0] < 0.060
    assert measure(lab, "a", "c")[0] < 0.005
    assert measure(lab, "b", "c")[0] < 0.005


def most(lab: Lab, source: str, target: str, num_bytes: int, *, at_least: float) -> float:
    """Bits per second; measured again if it was fewer, for a busy machine disturbs."""
    found = 0.0
    for _ in range(5):
        found = max(found, measure(lab, source, target, num_bytes)[1])
        if found > at_least:
            break
    return found


def test_a_link_and_a_card_are_as_fast_as_they_say(lab: Lab) -> None:
    assert 13e6 < most(lab, "a", "c", 3_000_000, at_least=13e6) < 22e6
    assert 26e6 < most(lab, "b", "c", 6_000_000, at_least=26e6) < 44e6


def test_a_large_message_comes_through_the_relay(lab: Lab) -> None:
    assert most(lab, "a", "b", 5_000_000, at_least=10e6) > 10e6


def test_a_quarter_of_a_core_is_that(lab: Lab) -> None:
    burning = [lab.popen(host, [sys.executable, "-c", BURN], stdout=subprocess.PIPE, text=True) for host in "ab"]
    free, limited = (float(each.communicate(timeout=240)[0]) for each in burning)
    # A machine that gives others less gives this one less, too.
    assert 0.4 * min(0.25, free) < limited < 0.33


def test_more_memory_than_there_is_kills(lab: Lab) -> None:
    done = lab.run("b", [sys.executable, "-c", "print(len(b'x' * 400_000_000))"])
    assert done.returncode == -signal.SIGKILL
    assert lab.run("b", [sys.executable, "-c", "print(len(b'x' * 100_000_000))"]).returncode == 0
    assert lab.run("a", [sys.executable, "-c", "print(len(b'x' * 400_000_000))"]).returncode == 0


def test_a_host_sees_its_own_limits(lab: Lab) -> None:
    script = "from devices.hardware.memory import host_free_bytes; print(host_free_bytes())"
    done = lab.run("b", [sys.executable, "-c", script], environment={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert int(done.stdout) <= 300_000_000


def test_hosts_share_the_store_and_nothing_else(lab: Lab) -> None:
    homes = [lab.run(host, ["sh", "-c", "echo $POTLUCK_HOME; realpath $POTLUCK_HOME/models"]).stdout for host in "ab"]
    (home_a, models_a), (home_b, models_b) = (home.split() for home in homes)
    assert home_a != home_b
    assert models_a == models_b == f"{lab.facts.store}/models"


def test_the_real_network_is_out_of_reach(lab: Lab) -> None:
    done = lab.run("a", [sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 80), 2)"])
    assert done.returncode == 1
    assert "unreachable" in done.stderr


def test_loss_is_seen_and_survived(tmp_path: Path) -> None:
    links = [{"between": ["a", "b"], "delay_ms": 1, "loss": 0.05}]
    with Lab(parse_spec({"hosts": [{"name": "a"}, {"name": "b"}], "links": links}), store=tmp_path) as lossy:
        echo = lossy.popen("b", [sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
        assert echo.stdout is not None
        echo.stdout.readline()
        measure(lossy, "a", "b", 1_000_000)
        said = lossy.run("a", ["sh", "-c", "cat /proc/net/snmp | grep Tcp:"]).stdout.splitlines()
        counters = dict(zip(said[0].split(), said[1].split(), strict=True))
        assert int(counters["RetransSegs"]) > 5


def everything_of(lab: str) -> list[str]:
    """What there is of a lab on this machine."""
    found = [str(path) for path in STATE_DIR.glob(f"*{lab}*")]
    found += [str(path) for path in Path("/run/netns").glob(f"{lab}*")]
    found += [str(path) for pattern in (f"{lab}*", f"*/{lab}*") for path in Path("/sys/fs/cgroup").glob(pattern)]
    return found


def test_nothing_is_left_after_it_or_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Lab(parse_spec(SPEC), store=tmp_path) as short:
        sleeper = short.popen("a", ["sleep", "1000"])
        assert len(everything_of(short.id)) > 5
        raise RuntimeError
    assert sleeper.poll() == -signal.SIGKILL
    assert everything_of(short.id) == []


def start_up(tmp_path: Path, *command: str) -> tuple[subprocess.Popen[str], str]:
    file = tmp_path / "lab.toml"
    file.write_text('[[hosts]]\nname = "a"\n[[hosts]]\nname = "b"\n[[links]]\nbetween = ["a", "b"]\ndelay_ms = 1\n')
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bench.lab", "up", str(file), "--store", str(tmp_path), "--", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    process, facts = start_up(tmp_path, "sh", "-c", "echo $POTLUCK_LAB; exec sleep 1000")
    assert everything_of(Path(facts).parent.name)
    process.send_signal(number)
    assert process.wait(120) == 130
    assert everything_of(Path(facts).parent.name) == []


def test_what_a_crash_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    inside = f"{sys.executable} -P -m bench.lab exec a -- sleep 1001 & sleep 1; echo $POTLUCK_LAB; wait"
    process, file = start_up(tmp_path, "sh", "-c", inside)
    facts = json.loads(Path(file).read_text())
    process.kill()
    process.wait()
    assert everything_of(facts["id"])
    assert facts["id"] in remove_leftovers()
    assert everything_of(facts["id"]) == []
    time.sleep(0.2)
    assert "sleep 1001" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_lab_that_is_up_is_no_leftover(lab: Lab) -> None:
    assert lab.id not in remove_leftovers()
    assert everything_of(lab.id)


def test_the_command_gives_the_exit_code(tmp_path: Path) -> None:
    process, said = start_up(tmp_path, "sh", "-c", "echo here; exit 7")
    assert (said, process.wait(120)) == ("here", 7)
