"""What speeds, clocks and versions mean, and a link that is really measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.pairing.identity import load_keys
from potluck.cli.doctor.check import clock_check, measure_link, speed_check, version_check
from potluck.host.local_host import ThisHost
from potluck.host.piece_server import HostPieceServer
from transport.errors import NotAllowed
from transport.messages.pool import PiecePeer
from transport.security.curve import new_key_pair


@pytest.mark.parametrize(
    ("bytes_per_s", "is_wifi", "state", "words"),
    [
        (110e6, False, "ok", "110.0 MB/s"),
        (40e6, True, "ok", "over Wi-Fi"),
        (5e6, True, "warning", "33 minutes"),
        (5e6, True, "warning", "a cable is faster"),
        (5e6, False, "warning", "switch"),
        (1e5, False, "warning", "28 hours"),
    ],
)
def test_a_slow_link_says_how_long_a_load_takes(bytes_per_s: float, is_wifi: bool, state: str, words: str) -> None:
    check = speed_check("beta: link", bytes_per_s, is_wifi=is_wifi)
    assert check.state == state
    assert words in f"{check.what} {check.hint}"


@pytest.mark.parametrize(
    ("off_s", "state", "words"),
    [(0.2, "ok", "0.2 s"), (-59.0, "ok", "59.0 s"), (61.0, "warning", "ahead"), (-4000.0, "warning", "4,000 s behind")],
)
def test_a_clock_may_be_off_a_little(off_s: float, state: str, words: str) -> None:
    check = clock_check("beta: clock", off_s)
    assert check.state == state
    assert words in check.what


def test_versions_that_differ_are_a_warning() -> None:
    assert version_check("beta: version", "0.1.0", "0.1.0").state == "ok"
    other = version_check("beta: version", "0.1.0", "0.0.9")
    assert (other.state, other.what) == ("warning", "Potluck 0.0.9, here 0.1.0")


def test_a_link_is_measured_by_members_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path))
    keys, member = load_keys(tmp_path / "identity"), new_key_pair()
    here = ThisHost(name="beta", address="127.0.0.1", keys=keys)
    giver = HostPieceServer(here, "tcp://127.0.0.1:*", lambda key: key == member.public)
    try:
        peer = PiecePeer("beta", giver.endpoint, keys.public)
        assert measure_link(peer, member, 5.0) > 0
        with pytest.raises(NotAllowed, match="beta"):
            measure_link(peer, new_key_pair(), 5.0)
    finally:
        giver.close()
