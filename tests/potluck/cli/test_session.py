"""Signals that end a command in order, as a process of its own meets them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.simulated_system import environment_of

_WAITS = """
import signal, time
from potluck.cli.session import ending_signals
{before}
try:
    with ending_signals():
        print("ready", flush=True)
        time.sleep(600)
except KeyboardInterrupt:
    print("in order", flush=True)
"""


def _waiting(before: str = "") -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-P", "-c", _WAITS.format(before=before)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_ends_it_in_order(number: signal.Signals) -> None:
    process = _waiting()
    process.send_signal(number)
    assert process.communicate(timeout=120)[0] == b"in order\n"
    assert process.returncode == 0


def test_under_nohup_a_closed_terminal_does_not() -> None:
    process = _waiting("signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[0] == b"in order\n"


def test_windows_has_other_signals() -> None:
    code = (
        "import signal; signal.SIGBREAK = 21; from potluck.cli.session import _ENDING; print(sorted(map(int, _ENDING)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment_of("Windows"),
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert done.stdout.strip() == "[2, 15, 21]", done.stderr
