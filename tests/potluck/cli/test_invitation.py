from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import IO

from rich.console import Console

from devices.pairing.credentials import PairingCodes, parse_code, parse_invite
from potluck.cli.invitation import show_first_invitation, show_invitation
from transport.security.curve import new_key_pair

OFFERED = PairingCodes()
INVITE = OFFERED.new_invite("192.168.178.20", 11501, key=new_key_pair().public, pool="ab" * 16, now=0.0)
CODE = OFFERED.new_code(now=0.0)


def shown(*, is_terminal: bool, width: int = 80) -> str:
    file = io.StringIO()
    show_invitation(Console(file=file, width=width, force_terminal=is_terminal, color_system=None), INVITE, CODE)
    return file.getvalue()


def test_what_is_printed_can_be_typed_and_pasted() -> None:
    lines = shown(is_terminal=False).splitlines()
    commands = [line.split("potluck join ")[1] for line in lines if "potluck join" in line]
    assert parse_code(commands[0].split("  ")[0]) == CODE.text
    assert parse_invite(commands[1].strip("'")) == INVITE
    assert "2 minutes" in lines[1]
    assert "1 hour" in lines[2]


def test_the_qr_code_is_for_terminals_that_are_wide_enough() -> None:
    assert "█" not in shown(is_terminal=False)
    assert "█" not in shown(is_terminal=True, width=40)
    code = [line for line in shown(is_terminal=True).splitlines() if "█" in line]
    assert 20 <= len(code) <= 32
    assert all(len(line) <= 80 for line in code)


def first_shown(file: IO[str]) -> None:
    show_first_invitation(Console(file=file, width=80, color_system=None), INVITE, CODE)
    file.flush()


def test_no_log_holds_an_invite_or_a_code(tmp_path: Path) -> None:
    """Of a service: a file, or the journal's socket."""
    log = tmp_path / "service.log"
    with log.open("w") as file:
        first_shown(file)
    ours, journal = socket.socketpair()
    with ours, journal, ours.makefile("w") as file:
        first_shown(file)
        written = journal.recv(65536).decode()
    for text in (log.read_text(), written):
        assert text == "To add a device: potluck invite\n"


def test_who_looks_on_is_shown_it_also_through_a_pipe() -> None:
    outwards, inwards = os.pipe()
    with os.fdopen(outwards) as seen, os.fdopen(inwards, "w") as file:
        first_shown(file)
        file.close()
        assert CODE.text in seen.read()
