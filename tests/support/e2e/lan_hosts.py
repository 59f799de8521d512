"""Hosts of one pool on this machine's loopback addresses, each with keys, a roster and models of its own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.support.e2e.known_devices import know_devices
from tests.support.e2e.potluck_process import ASK_S, READY_S, Home, Running, up_arguments

ONE_DEVICE = ("--device", "torch:cpu")
LOADED_S = READY_S


def new_home(models: Path | None = None) -> Home:
    """Of a host that has the `models`, or none, and knows its devices."""
    folder = Path(tempfile.mkdtemp(prefix="plt-"))
    home = Home(data=folder / "data", runtime=folder / "run")
    for each in (home.data, home.runtime):
        each.mkdir()
    know_devices(home.data / "probe.json")
    if models is not None:
        (home.data / "models").symlink_to(models)
    return home


def up(home: Home, name: str, address: str, *extra: str, port: int = 0) -> Running:
    network = ("--lan-host", address, "--lan-port", str(port), "--no-discovery", "--host-name", name)
    return Running(home, *up_arguments(*network, *extra, devices=ONE_DEVICE))


def join_arguments(name: str, address: str, *how: str) -> list[str]:
    network = ("--lan-host", address, "--no-discovery", "--host-name", name)
    return ["join", *how, *network, *ONE_DEVICE, "--threads", "1"]


def join(home: Home, name: str, address: str, *how: str) -> Running:
    return Running(home, *join_arguments(name, address, *how))


def new_invite(head: Home) -> str:
    invite: str = json.loads(head.run("invite", "--json").stdout)["invite"]
    return invite


def new_code(head: Home) -> str:
    code: str = json.loads(head.run("invite", "--json").stdout)["code"]
    return code


def stages(head: Running) -> list[tuple[str, str]]:
    """Host and device of each, once the ring is ready."""
    assert head.process.poll() is None, f"the head has ended: {head.said()}"
    response = httpx.get(f"{head.facts()['url']}/potluck/status", timeout=ASK_S)
    assert response.status_code == 200, f"{response.text}: {head.said()}"
    report: dict[str, Any] = response.json()
    return [(stage["host"], stage["device"]) for stage in report["stages"]] if report["state"] == "ready" else []


def hosts_of(head: Running) -> list[str]:
    """Those of the stages, once the ring is ready."""
    return [host for host, _ in stages(head)]


def is_down(head: Running) -> bool:
    return httpx.get(f"{head.facts()['url']}/health", timeout=ASK_S).status_code == 503


def answer(head: Running) -> str:
    """To a question, without chance."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Name three fruits."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    response = httpx.post(f"{head.facts()['url']}/v1/chat/completions", json=body, timeout=ASK_S)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def members(head: Home) -> dict[str, dict[str, Any]]:
    """What `potluck devices` says, by name."""
    rows = json.loads(head.run("devices", "--json").stdout)["devices"]
    return {row["name"]: row for row in rows}
