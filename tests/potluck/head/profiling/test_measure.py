"""The times of a pool are remembered where known, measured where not; what fails is named, and the rest go on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from msgspec import structs

from devices.hardware.device import Device
from devices.pairing.identity import load_keys
from planner.measurements import PoolTimes
from potluck.head.plan_watch import LearnedFactor
from potluck.head.pool import Pool
from potluck.head.profiling.cache import ProfileCache
from potluck.head.profiling.measure import MeasureOptions, PoolMeasurement, device_key, local_times_for, pool_times_for
from potluck.head.profiling.probes import host_pairs
from potluck.host.local_host import ThisHost
from potluck.host.node import Node
from shard.pieces.open import open_checkpoint
from tests.support.head.profiles import MadeUpProbes, model, report
from tests.support.planner.pool import device
from tests.support.shard.tiny import save_tiny
from transport.errors import ConfigError, NeighbourGone, StageFailed
from transport.messages.measure import LinkProbed
from transport.messages.ring import WeightsForm
from transport.security.curve import read_keys, write_keys

CPU, GPU = device("cpu", memory_pool="here/ram"), device("gpu", kind="cuda:0", memory_pool="here/gpu")
FAR = device("far", host="far", memory_pool="far/ram")


@dataclass
class MadeUpEnd:
    """An end of a link; one on a host in `apart` reaches nobody on another host in it."""

    host: str
    apart: tuple[str, ...] = ()
    probed: list[str] = field(default_factory=list)

    key = ""

    def listen(self, where: str, shape: Any, upstream: str) -> str:
        return self.host

    def probe(self, next: str, key: str, *, leads: bool) -> LinkProbed:
        self.probed.append(next)
        if self.host != next and {self.host, next} <= set(self.apart):
            raise NeighbourGone(f"the neighbour at {next} does not take messages")
        return LinkProbed(round_trips_s=(0.2,) * 20, held_s=(0.1,) * 20, bytes_per_s=1e8)

    def close(self) -> None:
        pass


def measuring(
    tmp_path: Path, probes: MadeUpProbes, *, fresh: bool = False, weights: WeightsForm = "stored"
) -> PoolMeasurement:
    return PoolMeasurement(
        model=model(tmp_path),
        cache=ProfileCache(tmp_path / "profiles"),
        probes=probes,
        say=lambda words: None,
        measuring=lambda device, what: None,
        options=MeasureOptions(fresh=fresh, weights=weights),
    )


def run(one: PoolMeasurement, devices: list[Device], *ends: Any) -> tuple[PoolTimes, dict[str, str]]:
    times, left_out = one.run(devices, MadeUpEnd("here"), ends)
    return times, {gone.name: gone.reason for gone in left_out}


def test_a_second_time_nothing_is_measured(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [report()], "gpu": [report(0.0001)]})
    first, left_out = run(measuring(tmp_path, probes), [CPU, GPU], MadeUpEnd("here"))
    assert left_out == {}
    assert [times.device for times in first.devices] == [CPU, GPU]
    assert [times.layers[0].decode.seconds[0][0] for times in first.devices] == [0.001, 0.0001]
    assert probes.asked == [["cpu"], ["gpu"]]
    assert probes.loaded == set()
    end = MadeUpEnd("here")
    second, _ = run(measuring(tmp_path, probes), [CPU, GPU], end)
    assert second == first
    assert end.probed == []


def test_fresh_measures_again(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [report(), report(0.005)]})
    run(measuring(tmp_path, probes), [CPU])
    times, _ = run(measuring(tmp_path, probes, fresh=True), [CPU])
    assert times.devices[0].layers[0].decode.seconds[0][0] == 0.005
    assert run(measuring(tmp_path, probes), [CPU])[0] == times


def test_what_other_programs_disturbed_is_said_and_measured_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed = [structs.replace(report(seconds), others_share=0.4) for seconds in (0.002, 0.003)]
    probes = MadeUpProbes({"cpu": [*disturbed, report(0.001)]})
    said: list[str] = []

    def decode_s() -> float:
        one = replace(measuring(tmp_path, probes), say=said.append)
        return run(one, [CPU])[0].devices[0].layers[0].decode.seconds[0][0]

    assert [decode_s(), decode_s()] == [0.002, 0.002]
    assert len(probes.asked) == 1
    assert any("40 %" in line and "--fresh" in line for line in said)
    began_s = time.time()
    monkeypatch.setattr(time, "time", lambda: began_s + 3600)
    assert decode_s() == 0.002  # Disturbed once more: the better one counts.
    monkeypatch.setattr(time, "time", lambda: began_s + 7200)
    assert decode_s() == 0.001
    assert decode_s() == 0.001
    assert len(probes.asked) == 3


def test_another_form_of_weights_is_measured_for_itself(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [report(), report(0.0004)]})
    stored, _ = run(measuring(tmp_path, probes), [CPU])
    quantized, _ = run(measuring(tmp_path, probes, weights="4-bit"), [CPU])
    assert probes.asked_weights == ["stored", "4-bit"]
    assert quantized.devices[0].layers[0].decode.seconds[0][0] == 0.0004
    assert run(measuring(tmp_path, probes), [CPU])[0] == stored
    assert run(measuring(tmp_path, probes, weights="4-bit"), [CPU])[0] == quantized


def test_a_device_that_fails_is_left_out_and_named(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [report()], "gpu": [StageFailed("the profile was ended by signal 9")]})
    times, left_out = run(measuring(tmp_path, probes), [CPU, GPU])
    assert [one.device.name for one in times.devices] == ["cpu"]
    assert left_out == {"gpu": "the profile was ended by signal 9"}


def test_no_device_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [StageFailed("out of order")]})
    with pytest.raises(ConfigError) as caught:
        run(measuring(tmp_path, probes), [CPU])
    assert "cpu: out of order" in caught.value.hint
    with pytest.raises(ConfigError):
        run(measuring(tmp_path, MadeUpProbes({})), [])


def test_devices_that_share_memory_are_measured_alone_and_together(tmp_path: Path) -> None:
    mlx = device("mlx", backend="mlx", kind="mlx", memory_pool="here/ram")
    probes = MadeUpProbes({"cpu": [report()], "mlx": [report(0.003)], "far": [report()]}, together=1.5)
    times, _ = run(measuring(tmp_path, probes), [CPU, mlx, FAR], MadeUpEnd("far"))
    # Hosts at the same time, devices of one in turn.
    assert probes.asked == [["cpu", "far"], ["mlx"]]
    assert probes.measured_together == [["cpu", "mlx"]]
    assert [one.busy for one in times.devices] == [1.5, 1.5, 1.0]
    assert run(measuring(tmp_path, probes), [CPU, mlx, FAR], MadeUpEnd("far"))[0] == times


def test_one_of_two_fails_and_is_tried_again_without_the_other(tmp_path: Path) -> None:
    mlx = device("mlx", backend="mlx", kind="mlx", memory_pool="here/ram")
    probes = MadeUpProbes({"cpu": [report(), report()], "mlx": [StageFailed("hangs"), report()]})
    times, left_out = run(measuring(tmp_path, probes), [CPU, mlx])
    assert left_out == {"mlx": "hangs"} and times.devices[0].busy == 1.0
    times, left_out = run(measuring(tmp_path, probes), [CPU, mlx])
    assert left_out == {}
    assert probes.asked == [["cpu"], ["mlx"], ["mlx"], ["cpu"]]  # At last, to be measured beside the other.
    assert [one.busy for one in times.devices] == [1.5, 1.5]


def test_devices_that_are_alike_get_equal_times(tmp_path: Path) -> None:
    twins = [device(name, memory_pool="here/ram") for name in ("cpu-1", "cpu-2")]
    probes = MadeUpProbes({"cpu-1": [report(0.001)], "cpu-2": [report(0.004)]})  # Somebody else was at work.
    times, _ = run(measuring(tmp_path, probes), twins)
    assert [one.layers[0].decode.seconds[0][0] for one in times.devices] == [0.001, 0.001]
    assert run(measuring(tmp_path, probes), twins)[0] == times


def test_what_was_learned_counts(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [report()]})
    run(measuring(tmp_path, probes), [CPU])
    key = device_key(model(tmp_path), CPU, "a machine", "stored")
    ProfileCache(tmp_path / "profiles").save_learned(key, LearnedFactor(factor=2.0, at_s=time.time()))
    said: list[str] = []
    times, _ = run(replace(measuring(tmp_path, probes), say=said.append), [CPU])
    assert times.devices[0].head.seconds[0][0] == pytest.approx(0.006, rel=1e-3)
    assert any("cpu took 2.00×" in line and "--fresh" in line for line in said)


def test_links_are_of_every_ordered_pair_of_hosts(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [report()], "far": [report()], "off": [report()]})
    off = device("off", host="off", memory_pool="off/ram")
    times, _ = run(
        measuring(tmp_path, probes),
        [CPU, FAR, off],
        MadeUpEnd("here"),
        MadeUpEnd("far", ("far", "off")),
        MadeUpEnd("off", ("far", "off")),
    )
    found = {(link.source, link.target) for link in times.links}
    # far and off don't reach each other, which the head need not care about.
    assert found == {("here", "here"), ("here", "far"), ("far", "here"), ("here", "off"), ("off", "here")}
    assert all(link.hop_s == pytest.approx(0.05) for link in times.links)


def test_a_host_that_can_not_be_reached_is_left_out(tmp_path: Path) -> None:
    probes = MadeUpProbes({"cpu": [report()]})
    times, left_out = run(measuring(tmp_path, probes), [CPU, FAR], MadeUpEnd("far", ("here", "far")))
    assert [one.device.name for one in times.devices] == ["cpu"]
    assert "can't be reached" in left_out["far"] and "does not take messages" in left_out["far"]


def test_pairs_of_a_pool() -> None:
    ends = [MadeUpEnd("here"), MadeUpEnd("far"), MadeUpEnd("far"), MadeUpEnd("off")]
    found = [(pair.leader.host, pair.follower.host, pair.where) for pair in host_pairs(MadeUpEnd("here"), ends)]
    assert found == [
        ("here", "here", "local"),
        ("far", "far", "local"),
        ("here", "far", "network"),
        ("here", "off", "network"),
        ("far", "off", "network"),
    ]


# With real processes.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    folder = save_tiny("llama", 0, tmp_path / "tiny")
    return replace(model(folder), spec=open_checkpoint(folder).spec)


def cpu(name: str, **changes: Any) -> Device:
    return device(name, compute_dtype="float32", memory_pool="here/ram", **changes)


def test_this_hosts_devices_without_a_pool(tiny: Any) -> None:
    broken = device("gpu", kind="cuda:63", memory_pool="here/gpu")
    doing: list[str] = []
    times, left_out = local_times_for(
        tiny, [cpu("cpu"), broken], say=print, measuring=lambda name, what: doing.append(f"{name}: {what}")
    )
    assert [one.device.name for one in times.devices] == ["cpu"]
    assert [gone.name for gone in left_out] == ["gpu"] and "cuda:63" in left_out[0].reason
    assert [(link.source, link.target) for link in times.links] == [("here", "here")]
    assert "cpu: the head" in doing
    again, _ = local_times_for(tiny, [cpu("cpu")], say=lambda words: None)
    assert again.devices == times.devices


class TwoHosts:
    """A roster of one other host."""

    def __init__(self, key: str) -> None:
        self._key = key

    def admits(self, key: str) -> bool:
        return key == self._key

    def name_of(self, key: str) -> str | None:
        return "far" if key == self._key else None

    def problem(self) -> ConfigError | None:
        return None

    def keys(self) -> tuple[str, ...]:
        return (self._key,)


@pytest.fixture
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pool, Path]]:
    run_dir = Path(tempfile.mkdtemp(prefix="pl-"))
    here, far_keys = (load_keys(tmp_path_factory.mktemp(name)) for name in ("here", "far"))
    far_file = run_dir / "far.json"
    write_keys(far_file, far_keys)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    one = Pool(
        context,
        run_dir,
        on_change=lambda: None,
        here=ThisHost(name="here", address="127.0.0.1", keys=here),
        roster=TwoHosts(far_keys.public),
        control="tcp://127.0.0.1:*",
    )
    assert one.control is not None
    here_file = run_dir / "here.json"
    write_keys(here_file, here)
    node, far = (
        Node(
            control=control,
            logs=run_dir,
            run_dir=run_dir,
            on_exit=one.on_worker_exit,
            address=address,
            keys_file=keys_file,
            head_key=head_key,
        )
        for control, address, keys_file, head_key in (
            (one.endpoint, "127.0.0.1", here_file, ""),
            (one.control, "127.0.0.2", far_file, here.public),
        )
    )
    try:
        node.start([cpu("a"), device("b", kind="cuda:63", memory_pool="here/gpu")])
        far.start([cpu("c", host="far")])
        one.wait_for_devices(["a", "b", "c"], 3, 60.0)
        yield one, run_dir
    finally:
        node.stop()
        far.stop()
        one.close()
        context.destroy(0)


def test_a_pool_measures_itself(pool: tuple[Pool, Path], tiny: Any) -> None:
    one, run_dir = pool
    here = ThisHost(name="here", address="127.0.0.1", keys=read_keys(run_dir / "here.json"))
    times, left_out = pool_times_for(tiny, one, here, run_dir=run_dir, say=print)
    assert [times.device.name for times in times.devices] == ["a", "c"]
    assert [gone.name for gone in left_out] == ["b"] and "cuda:63" in left_out[0].reason
    assert {(link.source, link.target) for link in times.links} == {
        ("here", "here"),
        ("here", "far"),
        ("far", "here"),
    }
    assert all(worker.fault is None for worker in one.workers())
    again, _ = pool_times_for(tiny, one, here, run_dir=run_dir, say=print)
    assert again.links == times.links
