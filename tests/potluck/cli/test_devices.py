"""`potluck devices`, `rename`, `revoke`, `forget`, and what is asked of a running head."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console
from typer.testing import CliRunner, Result

from devices.pairing.identity import fingerprint
from devices.pairing.known_pools import KnownPool, load_known_pools, save_known_pool
from devices.pairing.roster import RosterFile
from potluck.api import api_key
from potluck.cli.app import app_for
from potluck.cli.devices import DeviceRow, device_table
from potluck.host.local_head import HeadFile, LocalHead
from potluck.system.paths import known_pools_file, roster_file
from transport.errors import BadRequest, ConfigError, NotRunning, PotluckError
from transport.security.curve import new_key_pair

MAC, PC = new_key_pair().public, new_key_pair().public


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POTLUCK_RUNTIME", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def roster() -> RosterFile:
    file = RosterFile(roster_file(), name="den")
    file.add(MAC, "mac", "macOS arm64")
    file.add(PC, "a-gaming-pc-with-a-name-that-is-very-long", "Windows x86-64")
    return file


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app_for([]), arguments, **options)


def said(*arguments: str, **options: Any) -> str:
    result = run(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.output


def error_of(*arguments: str) -> PotluckError:
    error = run(*arguments).exception
    assert isinstance(error, PotluckError)
    return error


class Answering:
    """A head that answers from a table, and keeps what it was asked."""

    def __init__(self, answers: dict[str, tuple[int, Any]]) -> None:
        self.asked: list[tuple[str, Any, str | None]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked.append((self.path, json.loads(body or b"null"), self.headers.get("Authorization")))
                status, answer = answers[self.path]
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self._file = HeadFile()
        self._file.__enter__()
        url = f"http://127.0.0.1:{self._server.server_port}"
        self._file.publish(LocalHead(pid=1, url=url, model="tiny", control="ipc://x", host="den"))

    def close(self) -> None:
        self._file.__exit__(None, None, None)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)


@pytest.fixture
def head() -> Iterator[Answering]:
    answers: dict[str, tuple[int, Any]] = {
        "/potluck/status": (200, {"model": "tiny", "hosts": [{"name": "mac", "address": "192.168.1.7"}]}),
        "/potluck/invite": (
            200,
            {"invite": "potluck://x:1?key=a", "code": "7K3M-9XQ2", "code_expires_s": 120, "invite_expires_s": 3600},
        ),
        "/potluck/approve": (200, {"name": "kitchen-pc"}),
    }
    made = Answering(answers)
    made.answers = answers  # type: ignore[attr-defined]
    yield made
    made.close()


def test_a_pool_without_devices_says_how_to_add_one() -> None:
    assert "potluck invite" in said("devices")
    facts = json.loads(said("devices", "--json"))
    assert facts["devices"] == []
    assert len(facts["pool"]) == 32


def test_devices_are_listed(roster: RosterFile) -> None:
    roster.revoke("mac")
    table = said("devices")
    assert len(table.splitlines()) == 3  # Into a pipe no row is broken.
    assert fingerprint(MAC) in table
    assert "revoked" in table
    assert "today" in table
    mac, pc = json.loads(said("devices", "--json"))["devices"]
    assert (mac["name"], mac["fingerprint"], mac["platform"]) == ("mac", fingerprint(MAC), "macOS arm64")
    assert mac["revoked_at"] >= mac["paired_at"]
    assert pc["revoked_at"] is None
    assert pc["connected"] is None


def test_a_running_head_says_who_is_connected(roster: RosterFile, head: Answering) -> None:
    mac, pc = json.loads(said("devices", "--json"))["devices"]
    assert (mac["connected"], pc["connected"]) == (True, False)
    assert "connected" in said("devices")


def test_who_waits_is_listed_with_how_to_let_it_in(head: Answering) -> None:
    waits = {"name": "tv", "fingerprint": "3f2a-91bc-77d0-12e4", "platform": "Linux x86-64", "address": "192.168.1.9"}
    head.answers["/potluck/status"] = (200, {"hosts": [], "waiting": [waits]})  # type: ignore[attr-defined]
    text = said("devices")
    assert "3f2a-91bc-77d0-12e4" in text
    assert "potluck approve tv" in text
    assert "No device has paired" not in text
    assert json.loads(said("devices", "--json"))["waiting"] == [waits]


def test_a_joined_host_says_whose_pool_it_is_in() -> None:
    save_known_pool(
        known_pools_file(), KnownPool(pool="ab" * 16, key=MAC, name="den", my_name="pc", doors=("192.168.1.7:11501",))
    )
    text = said("devices")
    assert "No device has paired" not in text
    for words in ("pc", "den", fingerprint(MAC), "192.168.1.7:11501", "potluck join"):
        assert words in text
    (joined,) = json.loads(said("devices", "--json"))["joined"]
    assert (joined["head"], joined["name"], joined["fingerprint"]) == ("den", "pc", fingerprint(MAC))
    assert "joined the pool of den" in error_of("status").hint


def test_usual_names_are_not_folded_in_eighty_columns() -> None:
    now = 1_764_000_000.0
    row = DeviceRow(
        name="living-room-pc",
        fingerprint="3f2a-91bc-77d0-12e4",
        platform="Windows x86-64",
        paired_at=now,
        revoked_at=now,
        connected=None,
    )
    assert len(_in_eighty_columns([row], now)) == 2
    lines = _in_eighty_columns([replace(row, name=40 * "x")], now)
    assert all(len(line) <= 80 for line in lines)
    assert sum(line.count("x") for line in lines[1:]) == 40 + "Windows x86-64".count("x")


def _in_eighty_columns(rows: list[DeviceRow], now: float) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=80).print(device_table(rows, [], now))
    return out.getvalue().splitlines()


def test_a_device_is_renamed_by_name_or_fingerprint(roster: RosterFile) -> None:
    assert "mac is called laptop now" in said("rename", "mac", "laptop")
    assert "laptop is called mini now" in said("rename", fingerprint(MAC), "mini")
    assert RosterFile(roster.path).name_of(MAC) == "mini"
    assert isinstance(error_of("rename", "tv", "x"), ConfigError)
    assert isinstance(error_of("rename", "mini", "den"), ConfigError)


def test_a_head_that_runs_has_its_new_name_when_it_is_started_again(roster: RosterFile, head: Answering) -> None:
    assert "den is called attic when its head is started again" in said("rename", "den", "attic")
    assert "mac is called laptop now" in said("rename", "mac", "laptop")


def test_revoking_says_what_it_does_and_asks(roster: RosterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of("revoke", "mac")
    assert "--yes" in error.hint
    assert roster.admits(MAC)
    monkeypatch.setattr("potluck.cli.devices._is_terminal", lambda: True)
    asked = run("revoke", "mac", input="n\n")
    assert asked.exit_code == 1
    assert "downloaded" in asked.output
    assert RosterFile(roster.path).admits(MAC)
    assert "is revoked" in said("revoke", "mac", input="y\n")
    assert not RosterFile(roster.path).admits(MAC)
    said("revoke", fingerprint(PC), "--yes")
    assert RosterFile(roster.path).keys() == ()
    assert "revoked already" in error_of("revoke", "mac").message
    assert "head" in error_of("revoke", "den", "--yes").message


def test_a_joined_host_forgets_a_pool() -> None:
    pool = KnownPool(pool="ab" * 16, key=MAC, name="den", my_name="pc")
    save_known_pool(known_pools_file(), pool)
    text = said("forget", "den")
    assert "potluck revoke pc" in text
    assert "If this host was not revoked there" in text
    assert load_known_pools(known_pools_file()) == ()
    assert "not joined" in error_of("forget").message


def test_an_invite_comes_from_the_running_head(head: Answering) -> None:
    assert json.loads(said("invite", "--json"))["code"] == "7K3M-9XQ2"
    assert "potluck join 7K3M-9XQ2" in said("invite")
    assert head.asked == [("/potluck/invite", {}, None)] * 2


def test_commands_show_the_head_their_key(head: Answering) -> None:
    key = api_key.make_key()
    said("invite")
    assert head.asked[-1][2] == f"Bearer {key}"


def test_approving_answers_for_the_host_that_waits(head: Answering) -> None:
    assert "kitchen-pc is let in" in said("approve", "kitchen-pc")
    assert "kitchen-pc is not let in" in said("approve", "kitchen-pc", "--refuse")
    assert [asked[1]["allow"] for asked in head.asked] == [True, False]


def test_what_the_head_refuses_is_an_error_with_its_words(head: Answering) -> None:
    body = {"error": {"message": "no device called tv waits; waiting: mac", "type": "x", "code": "invalid_request"}}
    head.answers["/potluck/approve"] = (400, body)  # type: ignore[attr-defined]
    error = error_of("approve", "tv")
    assert isinstance(error, BadRequest)
    assert (error.message, error.hint) == ("no device called tv waits", "waiting: mac")


def test_without_a_head_there_is_nobody_to_ask() -> None:
    for arguments in (("invite",), ("approve", "mac")):
        assert isinstance(error_of(*arguments), NotRunning)
