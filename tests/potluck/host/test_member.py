"""What a joined host says when its workers have ended."""

from __future__ import annotations

import pytest

from potluck.host.node import _reason_in_log_line
from transport.errors import HostRevoked, RingDown, error_from_code


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2026-11-24 20:36:46,613 INFO stopping: the head has stopped", "the head has stopped"),
        ("2026-11-24 20:36:46,613 INFO stage 1 holds layers [1, 2)", ""),
        ("transport.errors.ConfigError: no keys", "transport.errors.ConfigError: no keys"),
        ("", ""),
    ],
)
def test_only_what_tells_why_is_a_reason(line: str, reason: str) -> None:
    assert _reason_in_log_line(line) == reason


def test_a_revoked_host_is_no_fault_of_who_asks() -> None:
    error = error_from_code(HostRevoked.code, "beta/cpu was revoked")
    assert isinstance(error, RingDown) and error.status == 503
