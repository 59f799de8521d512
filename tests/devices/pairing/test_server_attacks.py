"""Who means no good at a pairing server: no head, someone between, garbage, drips, and crowds."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec.structs import replace

from devices.pairing.client import fetch_pool_info
from devices.pairing.json_lines import ConnectionClosed, JsonLineSocket
from devices.pairing.pake import HeadPake, PairingHello, PairingOutcome, PakeConfirm, PakeStart
from devices.pairing.server import MAX_CONNECTIONS, MAX_PER_ADDRESS, Candidate, PoolInfo
from tests.support.devices.pairing_head import House, connection, guests, is_hung_up, other_code, until
from transport.errors import (
    ConfigError,
    NotRunning,
    PairingFailed,
    PotluckError,
    VersionMismatch,
)
from transport.messages.ring import PROTOCOL_VERSION
from transport.security.curve import new_key_pair


def answering(line: bytes) -> tuple[int, threading.Thread]:
    """A port where something says one line to whoever comes, once."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            sock.recv(4096)
            sock.sendall(line)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return listener.getsockname()[1], thread


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ConfigError),
        (b"x" * 5000, ConfigError),
        (b'{"type":"door","protocol":99,"potluck":"9.9","kitchen":true}\n', VersionMismatch),
        (b"", NotRunning),
    ],
)
def test_what_answers_and_is_no_head_is_told_apart(line: bytes, error: type[PotluckError]) -> None:
    port, thread = answering(line)
    with pytest.raises(error) as raised:
        fetch_pool_info("127.0.0.1", port, 60.0)
    thread.join(60.0)
    assert raised.value.hint


def test_where_nobody_answers_the_hint_says_what_to_look_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(NotRunning, match=f"nobody answers at 127.0.0.1:{port}") as raised:
        fetch_pool_info("127.0.0.1", port, 60.0)
    assert "potluck doctor" in raised.value.hint


class Between:
    """Someone between two hosts, who puts keys of their own into what both say."""

    def __init__(self, house: House) -> None:
        self.key = new_key_pair().public
        self._house = house
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as joiner_sock, connection(self._house) as head_sock:
            joiner, head = JsonLineSocket(joiner_sock), JsonLineSocket(head_sock)
            with contextlib.suppress(ConnectionClosed):
                head.send(joiner.receive(PairingHello, 60.0), 60.0)
                joiner.send(replace(head.receive(PoolInfo, 60.0), key=self.key), 60.0)
                head.send(replace(joiner.receive(PakeStart, 60.0), key=self.key), 60.0)
                for _ in range(4):
                    joiner_sock.sendall(head.receive_line(60.0) + b"\n")
                    head_sock.sendall(joiner.receive_line(60.0) + b"\n")

    def close(self) -> None:
        self._thread.join(60.0)


def test_someone_between_who_replaces_the_keys_is_noticed_by_both(house: House) -> None:
    between = Between(house)
    with pytest.raises(PairingFailed, match="wrong") as raised:
        house.pair(str(house.door.new_code()), port=between.port)
    between.close()
    assert "someone between" in raised.value.hint
    assert "wrong code" in house.heard[0]
    assert not house.asked
    assert house.roster.keys() == ()


def test_a_head_that_does_not_know_the_code_is_not_believed(house: House) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            lines = JsonLineSocket(sock)
            lines.receive(PairingHello, 60.0)
            lines.send(house.facts, 60.0)
            side = HeadPake("0000-0000", house.facts, lines.receive(PakeStart, 60.0))
            lines.send(side.reply, 60.0)
            lines.receive(PakeConfirm, 60.0)
            lines.send(side.confirmed(), 60.0)
            lines.send(side.result(PairingOutcome(decision="allowed", name="mac")), 60.0)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    waited: list[PoolInfo] = []
    with pytest.raises(PairingFailed, match="does not know the secret"):
        house.pair(str(house.door.new_code()), port=listener.getsockname()[1], on_waiting=waited.append)
    thread.join(60.0)
    assert not waited


def test_someone_between_can_not_use_an_invite_either(house: House) -> None:
    between = Between(house)
    with pytest.raises(PairingFailed, match="another head"):
        house.pair(house.door.new_invite(), port=between.port)
    between.close()
    assert house.roster.keys() == ()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 100 + b"\n",
        b"{}\n",
        b'{"type":"begin"}\n',
        b"[" * 4000 + b"\n",
        b"\xff\n",
        b"a" * 5000,
        b'{"type":"hello","protocol":5,"potluck":"1"}\n{"type":"confirm","proof":"AAAA"}\n',
        b'{"type":"hello","protocol":5,"potluck":"1"}\n' * 3,
    ],
)
def test_garbage_is_hung_up_on(house: House, data: bytes) -> None:
    with contextlib.closing(connection(house)) as sock:
        sock.sendall(data)
        assert is_hung_up(sock)
    assert not house.heard
    assert house.pair(str(house.door.new_code())).my_name == "mac"


def test_trouble_of_its_own_is_told_and_does_not_close_the_door(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devices.pairing.server._WARN_EVERY_S", 600.0)
    facts = house.facts
    del house.facts
    for _ in range(3):
        with contextlib.closing(connection(house)) as sock:
            JsonLineSocket(sock).send(PairingHello(protocol=PROTOCOL_VERSION, potluck="1"), 60.0)
            assert is_hung_up(sock)
    assert len(house.heard) == 1  # strangers can't fill the screen
    house.facts = facts
    assert house.pair(str(house.door.new_code())).my_name == "mac"


def test_a_line_that_drips_in_has_no_more_time_than_another(impatient: House) -> None:
    with contextlib.closing(connection(impatient)) as sock, contextlib.suppress(OSError):
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            sock.sendall(b"x")
            time.sleep(0.02)
        pytest.fail("it listened for forty times as long")
    assert fetch_pool_info("127.0.0.1", impatient.door.port) == impatient.facts


def test_one_address_does_not_take_all_of_the_door(patient: House) -> None:
    socks = [connection(patient) for _ in range(MAX_PER_ADDRESS)]
    with contextlib.closing(connection(patient)) as one_more:
        assert b"busy" in one_more.recv(4096)
        assert is_hung_up(one_more)
    with contextlib.closing(connection(patient, "127.0.0.2")) as other:
        other.sendall(b'{"type":"hello","protocol":5,"potluck":"1"}\n')
        assert b"den" in other.recv(4096)
    for sock in socks:
        sock.close()


def test_the_door_holds_so_many_and_no_more(patient: House) -> None:
    socks = [connection(patient, f"127.0.0.{3 + number % 5}") for number in range(5 * MAX_PER_ADDRESS)]
    until(lambda: sum(is_hung_up(sock, 0.05) for sock in socks) >= len(socks) - MAX_CONNECTIONS)
    assert guests() == MAX_CONNECTIONS
    for sock in socks:
        sock.close()


def test_who_holds_the_whole_door_from_few_addresses_keeps_nobody_out(patient: House) -> None:
    """Nor puts out a host that waits to be let in, from however many."""
    asked, answered = threading.Event(), threading.Event()

    def answer(candidate: Candidate) -> bool:
        asked.set()
        return answered.wait(60.0)

    patient.answer = answer
    code = str(patient.door.new_code())
    held = [connection(patient, f"127.0.0.{3 + number % 4}") for number in range(MAX_CONNECTIONS)]
    until(lambda: guests() == MAX_CONNECTIONS)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(patient.pair, code)
        assert asked.wait(60.0)
        held += [connection(patient, f"127.0.0.{3 + number % 4}") for number in range(20)]
        assert fetch_pool_info("127.0.0.1", patient.door.port) == patient.facts
        held += [connection(patient, f"127.0.0.{7 + number}") for number in range(30)]
        answered.set()
        assert joining.result(60.0).my_name == "mac"
    for sock in held:
        sock.close()


def test_a_hundred_hostile_connections_do_not_keep_a_host_out(house: House) -> None:
    hostile = [connection(house, f"127.0.0.{3 + number % 3}") for number in range(100)]
    for number, sock in enumerate(hostile):
        with contextlib.suppress(OSError):
            sock.sendall((b"\x00" * 3000, b'{"type":"hello",', b"")[number % 3])
    assert guests() <= MAX_CONNECTIONS
    with socket.create_connection(("127.0.0.1", house.door.port), 60.0, source_address=("127.0.0.2", 0)):
        assert house.pair(str(house.door.new_code())).my_name == "mac"
    for sock in hostile:
        sock.close()


def test_many_who_guess_at_once_get_three_guesses_together(house: House) -> None:
    code = str(house.door.new_code())

    def guess(number: int) -> str:
        try:
            house.pair(other_code(code), keys=new_key_pair(), name=f"guest-{number}")
        except PotluckError as error:
            return error.message
        return "in"

    with ThreadPoolExecutor(MAX_PER_ADDRESS) as pool:
        answers = list(pool.map(guess, range(MAX_PER_ADDRESS)))
    assert "in" not in answers
    assert len(house.heard) == 3
    with pytest.raises(PairingFailed, match="locked"):
        house.pair(code)
