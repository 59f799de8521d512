"""A host with a head: whether others can come in, and how each of them is connected."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from devices.pairing.identity import fingerprint, load_keys
from potluck.cli.doctor.check import Check
from potluck.cli.doctor.command import run_checks
from potluck.cli.doctor.head_checks import HeadNetwork, HostLink, head_checks, pool_checks
from potluck.cli.doctor.probe import ConnectOutcome, ConnectResult
from potluck.head.status import HostReport, StatusReport
from potluck.host.local_head import HeadFile, LocalHead
from potluck.host.local_host import ThisHost
from potluck.host.piece_server import HostPieceServer
from potluck.system.settings import Settings
from tests.support.doctor.small_head import SmallHead
from transport.errors import NotAllowed
from transport.security.curve import new_key_pair

BETA = HostReport(
    name="beta",
    fingerprint="3f2a-91bc-77d0-12e4",
    platform="macOS arm64",
    potluck="0.1.0",
    address="192.168.1.30",
    is_wifi=False,
    clock_off_s=0.5,
    pieces="tcp://192.168.1.30:40000",
    devices=["beta/mlx"],
)


def at(outcome: ConnectOutcome) -> ConnectResult:
    return ConnectResult(address="192.168.1.30", port=40000, outcome=outcome)


LINK = HostLink(report=BETA, is_wifi=False, connection=at("open"), speed=110e6)


def by_name(facts: HeadNetwork) -> dict[str, Check]:
    return {check.name: check for check in pool_checks(facts, own_version="0.1.0", firewall="open ufw")}


@pytest.mark.parametrize(
    ("link", "name", "state", "words"),
    [
        (LINK, "link", "ok", "110.0 MB/s"),
        (replace(LINK, speed=3e6, is_wifi=True), "link", "warning", "a cable is faster"),
        (replace(LINK, connection=at("timed out"), speed=None), "link", "problem", "on beta, let Potluck through"),
        (replace(LINK, connection=at("refused"), speed=None), "link", "problem", "is potluck running on beta"),
        (replace(LINK, speed=NotAllowed("beta refused")), "link", "warning", "beta refused"),
        (replace(LINK, speed=None), "link", "ok", "not measured"),
        (replace(LINK, report=msgspec.structs.replace(BETA, potluck="0.0.9")), "version", "warning", "update"),
        (replace(LINK, report=msgspec.structs.replace(BETA, clock_off_s=-90.0)), "clock", "warning", "90 s behind"),
    ],
)
def test_each_host_that_is_connected_is_judged(link: HostLink, name: str, state: str, words: str) -> None:
    check = by_name(HeadNetwork(ports=(), links=(link,), away=()))[f"beta: {name}"]
    assert check.state == state
    assert words in f"{check.what} {check.hint}"


def test_hosts_that_are_away_are_listed_and_if_all_are_the_firewall_may_be_why() -> None:
    some = by_name(HeadNetwork(ports=(), links=(LINK,), away=("gamma",)))["away"]
    assert (some.state, some.what) == ("ok", "gamma")
    assert "ufw" not in some.hint
    assert "open ufw" in by_name(HeadNetwork(ports=(), links=(), away=("gamma",)))["away"].hint
    assert "potluck invite" in by_name(HeadNetwork(ports=(), links=(), away=()))["devices"].hint


def test_a_port_of_the_head_that_is_not_open_is_a_problem() -> None:
    facts = HeadNetwork(ports=(("door", at("open")), ("control", at("timed out"))), links=(), away=())
    assert by_name(facts)["door port"].state == "ok"
    assert by_name(facts)["control port"].state == "problem"


def test_a_head_that_keeps_others_out_is_well() -> None:
    facts = LocalHead(pid=1, url="http://127.0.0.1:1", model="tiny", control="ipc://c", host="alpha")
    checks = list(head_checks(facts, firewall=""))
    assert [check.state for check in checks] == ["ok"]
    assert "--no-lan" in checks[0].hint


@pytest.fixture
def status() -> Iterator[ThreadingHTTPServer]:
    """What answers in place of the head's endpoint; its `report` is the head's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = msgspec.json.encode(self.server.report)  # type: ignore[attr-defined]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def report_with(url: str, door: str, *hosts: HostReport) -> StatusReport:
    return StatusReport(
        model="tiny",
        url=url,
        lan=door,
        state="ready",
        error=None,
        hint=None,
        pid=os.getpid(),
        engine_pid=None,
        context_tokens=0,
        kv_capacity_tokens=0,
        engine=None,
        plan=None,
        better_plan=None,
        stages=[],
        idle_devices=[],
        hosts=list(hosts),
        logs="",
    )


def test_a_head_measures_the_links_to_its_hosts_and_sees_who_is_away(
    home: Path, folder: Path, status: ThreadingHTTPServer
) -> None:
    head = SmallHead(home, "127.0.0.1")
    beta, gamma, visitor = load_keys(folder / "beta"), new_key_pair(), new_key_pair()
    for keys, name in ((beta, "beta"), (gamma, "gamma"), (visitor, "visitor")):
        head.roster.add(keys.public, name, "Linux x86-64")
    here = ThisHost(name="beta", address="127.0.0.1", keys=beta)
    giver = HostPieceServer(here, "tcp://127.0.0.1:*", lambda key: key == head.key)
    own = load_keys(home / "identity")
    assert own.public == head.key
    change = msgspec.structs.replace
    url = f"http://127.0.0.1:{status.server_address[1]}"
    connected = change(BETA, fingerprint=fingerprint(beta.public), pieces=giver.endpoint, address="127.0.0.1")
    asks = change(BETA, name="visitor", fingerprint=fingerprint(visitor.public), pieces="")
    status.report = report_with(url, head.pairing_address, connected, asks)  # type: ignore[attr-defined]
    facts = LocalHead(pid=os.getpid(), url=url, model="tiny", control="ipc://c", host="alpha", lan=head.pairing_address)
    try:
        with HeadFile() as file:
            file.publish(facts)
            found = {check.name: check for check in run_checks(Settings(discovery=False))}
            giver.close()
            gone = {check.name: check for check in run_checks(Settings(discovery=False))}
    finally:
        giver.close()
        head.close()
    assert found["head"].what == f"serves tiny, open to other hosts at {head.pairing_address}"
    assert found["door port"].state == found["control port"].state == "ok"
    assert "MB/s" in found["beta: link"].what
    assert found["away"].what == "gamma, visitor"
    assert not any(name.startswith("visitor") for name in found)
    assert gone["beta: link"].state == "problem"
    assert "refused" in gone["beta: link"].what
