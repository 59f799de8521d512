"""How long the solvers take: `python -m bench.planner_speed`. JSON on stdout."""

from __future__ import annotations

import argparse
import json
import random
import time

from bench.hardware import facts
from devices.device import Device
from planner.branch import solve
from planner.cost import CostModel
from planner.evaluate import Objective
from planner.limits import whole_pool
from planner.measured import DeviceTimes, Grid, LayerTimes, LinkTimes, PoolTimes
from planner.profile import ModelProfile, PartBytes
from planner.workload import Workload

_GIB = 2**30
_OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "auto")


def model_70b(num_layers: int = 80) -> ModelProfile:
    """The shape of a 70B model, in 16 bits."""
    return ModelProfile(
        name="70b",
        num_layers=num_layers,
        hidden_size=8192,
        context_tokens=8192,
        tied_embeddings=False,
        layer_params=(856_000_000,) * num_layers,
        head_params=1_050_000_000,
        sizes=(_sizes_70b(num_layers),),
        kv_elements_per_token=(2048,) * num_layers,
        windows=(None,) * num_layers,
        legal_cuts=tuple(range(1, num_layers)),
    )


def _sizes_70b(num_layers: int) -> PartBytes:
    return PartBytes(
        weights="stored",
        backend="torch",
        dtype="bfloat16",
        layers=(2 * 856_000_000,) * num_layers,
        embed=2 * 1_050_000_000,
        norm=2 * 8192,
        head=2 * 1_050_000_000,
    )


def pool_of(num_devices: int, num_kinds: int, seed: int, devices_per_host: int = 1) -> PoolTimes:
    """Devices of `num_kinds` kinds, as unequal as a home's; at least two hold a 70B model together."""
    rng = random.Random(seed)
    kinds = [_kind(rng) for _ in range(num_kinds)]
    facts = [(f"h{number // devices_per_host}", *kinds[number % num_kinds]) for number in range(num_devices)]
    room = {host: max(size for at, *_, size in facts if at == host) * 5 // 4 for host, *_ in facts}
    devices = [_device(f"d{number}", *fact, room[fact[0]]) for number, fact in enumerate(facts)]
    hosts = sorted({times.device.host for times in devices})
    hops = {pair: 10 ** rng.uniform(-3.7, -2.3) for pair in ((a, b) for a in hosts for b in hosts)}
    if num_kinds < num_devices:
        hops = dict.fromkeys(hops, 5e-4)
    links = [
        LinkTimes(source=a, target=b, hop_s=hop_s, hop_p95_s=2 * hop_s, bytes_per_s=1e8)
        for (a, b), hop_s in hops.items()
    ]
    return PoolTimes(head="h0", devices=tuple(devices), links=tuple(links))


def _kind(rng: random.Random) -> tuple[float, float, int]:
    """Seconds of a layer, how much slower beside its neighbours, and bytes."""
    return 10 ** rng.uniform(-2.7, -1.7), rng.choice([1.0, 1.4]), int(rng.uniform(12, 48) * _GIB)


def _device(name: str, host: str, layer_s: float, busy: float, num_bytes: int, pool_bytes: int) -> DeviceTimes:
    def grid(scale_s: float, rows: tuple[int, int]) -> Grid:
        seconds = tuple(
            tuple(scale_s * (1 + 0.05 * row) * (1 + context / 1e5) for context in (0, 4096)) for row in rows
        )
        return Grid(rows=rows, contexts=(0, 4096), seconds=seconds)

    return DeviceTimes(
        device=Device(
            name=name,
            backend="torch",
            kind="cpu",
            host=host,
            threads=1,
            free_bytes=num_bytes,
            total_bytes=pool_bytes,
            bandwidth_bytes_per_s=1.7e9 / layer_s,
            compute_dtype="bfloat16",
            memory_pool=f"{host}/ram",
        ),
        kinds=(0,) * 80,
        layers=(LayerTimes(decode=grid(layer_s, (1, 8)), prefill=grid(layer_s, (16, 256))),),
        embed=grid(layer_s / 100, (1, 8)),
        head=grid(layer_s, (1, 8)),
        step_s=3e-4,
        busy=busy,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=4)
    args = parser.parse_args()
    cases = [(8, 8, 1), (12, 12, 1), (12, 4, 1), (12, 12, 2)]
    rows = []
    for num_devices, num_kinds, per_host in cases:
        for objective in _OBJECTIVES:
            taken = []
            exact = True
            for seed in range(args.seeds):
                pool = pool_of(num_devices, num_kinds, seed, per_host)
                costs = CostModel(model_70b(), pool, Workload(concurrency=args.concurrency))
                start_s = time.perf_counter()
                solution = solve(costs, objective, whole_pool(costs))
                taken.append(time.perf_counter() - start_s)
                exact &= solution is not None and solution.is_exact
            rows.append(
                {
                    "devices": num_devices,
                    "kinds": num_kinds,
                    "devices_per_host": per_host,
                    "layers": 80,
                    "objective": objective,
                    "worst_s": max(taken),
                    "all_s": taken,
                    "exact": exact,
                }
            )
    print(json.dumps({"hardware": facts(), "concurrency": args.concurrency, "rows": rows}))


if __name__ == "__main__":
    main()
