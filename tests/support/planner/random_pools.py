"""Small random models and pools of unequal layers, links, memory and shared resources."""

from __future__ import annotations

import random
from dataclasses import replace

from devices.hardware.device import Device
from planner.measurements import DeviceTimes, LinkTimes, PoolTimes
from planner.memory import CPU_RESERVE_BYTES, ModelProfile
from planner.options import Workload
from tests.support.planner.pool import MIB, model
from transport.messages.measure import Grid, LayerTimes


def random_profile(rng: random.Random, num_layers: int) -> ModelProfile:
    cuts = [cut for cut in range(1, num_layers) if rng.random() < 0.9]
    tied = rng.random() < 0.4
    head = rng.randint(1, 80) * MIB
    return model(
        num_layers,
        hidden_size=rng.choice([64, 4096, 100_000]),
        layer_params=tuple(rng.randint(1, 60) * MIB for _ in range(num_layers)),
        embed_params=head if tied else rng.randint(1, 80) * MIB,
        head_params=head,
        tied_embeddings=tied,
        legal_cuts=tuple(cuts),
        windows=tuple(rng.choice([None, 64]) for _ in range(num_layers)),
    )


def random_workload(rng: random.Random) -> Workload:
    return Workload(
        prompt_tokens=rng.randint(1, 600),
        output_tokens=rng.randint(1, 300),
        concurrency=rng.choice([1, 1, 2, 3, 4, 7, 16]),
        context_tokens=1024,
    )


def grid(
    rng: random.Random, scale_s: float, rows: tuple[int, ...] = (1, 8), contexts: tuple[int, ...] = (0, 1024)
) -> Grid:
    at_one = scale_s * rng.uniform(0.3, 3)
    by_row, by_token = rng.uniform(0.01, 0.6), rng.uniform(0, 1e-3)
    seconds = tuple(
        tuple(at_one * (1 + by_row * (row - 1)) * (1 + by_token * context) for context in contexts) for row in rows
    )
    return Grid(rows=rows, contexts=contexts, seconds=seconds)


def random_times(rng: random.Random, device: Device, kinds: tuple[int, ...]) -> DeviceTimes:
    scale_s = 10 ** rng.uniform(-3.3, -2)
    return DeviceTimes(
        device=device,
        kinds=kinds,
        layers=tuple(
            LayerTimes(decode=grid(rng, scale_s), prefill=grid(rng, 3 * scale_s, (16, 256)))
            for _ in range(max(kinds) + 1)
        ),
        embed=grid(rng, scale_s / 5, contexts=(0,)),
        head=grid(rng, 2 * scale_s, contexts=(0,)),
        step_s=rng.uniform(0, scale_s),
        busy=rng.choice([1.0, 1.0, 1.3, 2.0]),
    )


def random_pool(rng: random.Random, profile: ModelProfile, num_devices: int) -> PoolTimes:
    """Hosts with one or several devices; some links are missing, some share a medium; twins happen."""
    hosts = [f"h{number}" for number in range(rng.randint(1, num_devices))]
    kinds = tuple(rng.randrange(3) for _ in range(profile.num_layers))
    sizes = profile.part_bytes("torch", "bfloat16")
    whole = sum(sizes.layers) + sizes.embed + sizes.head + 40 * MIB
    room = rng.choice([0.6, 1.0, 2.0, 5.0])
    totals: dict[str, int] = {}
    devices: list[DeviceTimes] = []
    for number in range(num_devices):
        host = hosts[number] if number < len(hosts) else rng.choice(hosts)
        pool = f"{host}/{rng.choice(['ram', 'ram', 'vram'])}"
        totals.setdefault(pool, int(whole * rng.uniform(0.3, 1.4) * room) + rng.choice([1, 2]) * CPU_RESERVE_BYTES)
        device = Device(
            name=f"d{number}",
            backend="torch",
            kind="cpu",
            host=host,
            threads=1,
            free_bytes=min(totals[pool], int(whole * rng.uniform(0.2, 1.2) * room) + CPU_RESERVE_BYTES),
            total_bytes=totals[pool],
            bandwidth_bytes_per_s=rng.uniform(1e9, 1e11),
            compute_dtype=rng.choice(["bfloat16", "bfloat16", "float32"]),
            memory_pool=pool,
        )
        if devices and rng.random() < 0.3:
            twin = rng.choice(devices)
            same = replace(device, free_bytes=twin.device.free_bytes, compute_dtype=twin.device.compute_dtype)
            if same.free_bytes <= same.total_bytes:
                devices.append(replace(twin, device=same))
                continue
        devices.append(random_times(rng, device, kinds))
    return PoolTimes(head=rng.choice(hosts), devices=tuple(devices), **_links(rng, hosts))  # type: ignore[arg-type]


def _links(rng: random.Random, hosts: list[str]) -> dict[str, object]:
    uniform = rng.random() < 0.3
    common = 10 ** rng.uniform(-5, -2.3), 10 ** rng.uniform(6, 9)
    links = []
    for source in hosts:
        for target in hosts:
            if source != target and rng.random() < 0.08:
                continue
            hop_s, rate = common if uniform else (10 ** rng.uniform(-5, -2.3), 10 ** rng.uniform(6, 9))
            links.append(LinkTimes(source=source, target=target, hop_s=hop_s, hop_p95_s=hop_s, bytes_per_s=rate))
    pairs = [(link.source, link.target) for link in links if link.source != link.target]
    shared = ()
    if len(pairs) >= 2 and rng.random() < 0.5:
        shared = (tuple(rng.sample(pairs, rng.randint(2, len(pairs)))),)
    return {"links": tuple(links), "shared_links": shared}
