"""`potluck doctor` as a user runs it, alone and between hosts that a firewall keeps apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.lab import Lab, parse_spec, why_not
from devices.discovery.mdns import AdvertisedPool
from potluck.cli.doctor.check import Check
from potluck.cli.doctor.command import check_table, summary
from potluck.cli.doctor.member_checks import pools_check

DOCTOR = [sys.executable, "-P", "-m", "potluck", "doctor"]
# From the ports that a system connects from, to those that programs listen at: what comes in anew, not what answers.
COMES_IN = ("ipproto", "tcp", "sport", "32768-60999", "dport")


def test_a_host_with_nothing_is_well_and_told_how_to_begin(home: Path, folder: Path) -> None:
    (folder / "config.toml").write_text("lan = false\n")
    done = subprocess.run(
        [*DOCTOR, "--json", "--no-discovery"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["state"] != "problem"
    checks = {check["name"]: check for check in report["checks"]}
    assert {"versions", "memory", "disk", "network", "clock", "ports", "head"} <= set(checks)
    assert "multicast" not in checks
    assert "potluck up MODEL" in checks["head"]["hint"]
    assert list(home.iterdir()) == []


def test_pools_nearby_are_shown_with_the_way_in() -> None:
    near = AdvertisedPool(addresses=("192.168.1.20",), port=11501, fingerprint="3f2a-91bc-77d0-12e4")
    check = pools_check([near])
    assert "3f2a-91bc-77d0-12e4 at 192.168.1.20:11501" in check.what
    assert "potluck join --head 192.168.1.20:11501" in check.hint
    assert "potluck up" in pools_check([]).hint or "--head" in pools_check([]).hint


def test_the_table_fits_a_narrow_terminal_and_cuts_nothing() -> None:
    long = "/a/folder/with/a/name/that/is/longer/than/the/line/" * 3
    checks = [
        Check(name="disk", state="problem", what=long, hint="set POTLUCK_HOME to [red]another[/red] folder, " * 3),
        Check(name="a-host-with-the-longest-name-of-all-hosts: link", state="warning", what="[bold]", hint=""),
    ]
    console = Console(file=StringIO(), width=80)
    console.print(check_table(checks))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in shown.splitlines())
    squeezed = "".join(shown.split())
    assert long in squeezed.replace("problemdisk", "")
    assert "[red]another[/red]" in squeezed and "[bold]" in squeezed
    assert summary(checks) == "2 checks: 1 problem, 1 warning"
    assert summary([]) == "0 checks: all is well"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(parse_spec({"hosts": [{"name": "alpha"}, {"name": "beta"}]}), store=tmp_path) as lab:
        yield lab


def doctor(lab: Lab, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    names = {"POTLUCK_HOME": "beta", "POTLUCK_RUNTIME": "run", "POTLUCK_CONFIG": "config.toml"}
    environment = {name: str(folder / value) for name, value in names.items()}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = lab.run("beta", [*DOCTOR, "--json", *arguments], environment=environment, timeout_s=240.0)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def keep_out(lab: Lab, host: str, ports: str) -> None:
    """As a firewall does that drops what comes in: without a word."""
    for rule in (("add", "pref", "100", "lookup", "local"), ("delete", "pref", "0")):
        assert lab.run(host, ["ip", "rule", *rule]).returncode == 0
    rule = ("add", "pref", "10", "iif", "eth0", *COMES_IN, ports, "blackhole")
    assert lab.run(host, ["ip", "rule", *rule]).returncode == 0


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_firewall_is_named_with_the_way_that_it_closes(lab: Lab, folder: Path) -> None:
    (folder / "run").mkdir()
    command = [sys.executable, "-m", "tests.support.doctor.small_head", str(folder / "alpha"), lab.address("alpha")]
    head = lab.popen(
        "alpha",
        [*command, str(folder / "beta")],
        environment={"PYTHONPATH": os.pathsep.join(sys.path), "POTLUCK_HOME": str(folder / "alpha")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdin is not None and head.stdout is not None
    assert head.stdout.readline() == "up\n"

    code, well = doctor(lab, folder)
    assert (code, well["alpha: way back"]["state"], well["multicast"]["what"]) == (0, "ok", "works on eth0")
    assert "eth0" in well["network"]["what"] and "MB/s" in well["alpha: link"]["what"]

    keep_out(lab, "beta", "1024-65534")
    code, one_way = doctor(lab, folder, "--no-discovery")
    assert code == 1
    assert [name for name, check in one_way.items() if check["state"] == "problem"] == ["alpha: way back"]
    assert "no answer, so a firewall drops it" in one_way["alpha: way back"]["what"]
    assert "10.77.0.0/24" in one_way["alpha: way back"]["hint"]

    keep_out(lab, "alpha", "11502")
    code, neither = doctor(lab, folder, "--no-discovery")
    assert [name for name, check in neither.items() if check["state"] == "problem"] == ["alpha: control"]
    assert "11502 through the firewall" in neither["alpha: control"]["hint"]

    lab.unplug("alpha")
    assert lab.run("beta", ["ip", "neighbour", "flush", "dev", "eth0"]).returncode == 0
    code, away = doctor(lab, folder, "--no-discovery")
    assert "no way there" in away["head alpha"]["what"]
    head.stdin.close()
